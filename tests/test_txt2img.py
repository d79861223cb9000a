"""The original command: its options, its files, its noise, its pixels, and where ours differs on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from latentmill import cli
from latentmill.engine import (
    EMBEDDED_MODEL,
    Engine,
    GenerationRequest,
    SafetyVerdict,
    embed_watermark,
    watermark_bit_accuracy,
)
from latentmill.jobs.errors import UsageError
from latentmill.jobs.txt2img.drawing import Txt2ImgPlan, generate_batches, load_engine, run_txt2img, watermarked
from latentmill.jobs.txt2img.files import OutputFolder, draw_grid, grid_size
from latentmill.jobs.txt2img.options import (
    DEFAULT_CKPT,
    DEFAULT_CONFIG,
    LAION_CKPT,
    LAION_CONFIG,
    LAION_OUTDIR,
    build_parser,
    parse_options,
)
from tests.engine.families import write_ldm
from tests.engine.originals import write_ckpt
from tests.original_script import (
    ROOT,
    SMALL,
    assert_the_originals,
    originals_pictures,
    our_pictures,
    own_schedule,
    plan,
    small_config,
    write_small_sd1,
)

pytestmark = pytest.mark.slow

ARTICLE: dict[str, Any] = {
    "prompt": "a painting of a virus monster playing guitar",
    "outdir": "outputs/txt2img-samples",
    "skip_grid": False,
    "skip_save": False,
    "ddim_steps": 50,
    "plms": False,
    "laion400m": False,
    "fixed_code": False,
    "ddim_eta": 0.0,
    "n_iter": 2,
    "H": 512,
    "W": 512,
    "C": 4,
    "f": 8,
    "n_samples": 3,
    "n_rows": 0,
    "scale": 7.5,
    "from-file": None,
    "config": "configs/stable-diffusion/v1-inference.yaml",
    "ckpt": "models/ldm/stable-diffusion-v1/model.ckpt",
    "seed": 42,
    "precision": "autocast",
}
"""The options of the original script and their defaults, as the article lists them."""

OF_THE_CHECKPOINT = {"H", "W", "C", "f", "config", "ckpt"}
"""Those whose defaults hold only where a checkpoint is named: without one, the embedded model decides."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def embedded() -> Engine:
    """The embedded model in batches of 2."""
    return load_engine(plan("--n_samples", 2))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sd1(tmp_path_factory.mktemp("sd1"))


def checkpoint(sd1: Path, *arguments: object) -> Txt2ImgPlan:
    return plan("--ckpt", sd1 / "model.ckpt", "--config", sd1 / "config.yaml", "--f", 4, *arguments)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# Options


def test_every_option_of_the_article_has_its_name_and_default():
    found = parse_options([])
    for name, default in ARTICLE.items():
        if name not in OF_THE_CHECKPOINT:
            assert getattr(found, name.replace("-", "_")) == default, name
    assert (ARTICLE["config"], ARTICLE["ckpt"]) == (DEFAULT_CONFIG, DEFAULT_CKPT)


def test_there_are_no_options_but_those_of_the_article_and_two_more():
    names = {name for action in build_parser("x")._actions for name in action.option_strings}
    assert names == {f"--{name}" for name in ARTICLE} | {"-h", "--help", "--dpm_solver", "--rng"}
    assert len(ARTICLE) == 22


def test_a_checkpoint_brings_the_articles_size_and_latents_along(sd1):
    described = checkpoint(sd1)
    assert (described.width, described.height) == (ARTICLE["W"], ARTICLE["H"])
    with pytest.raises(UsageError, match="--f is 8 by default, but the model model has 4 pixels per cell; give --f 4"):
        plan("--ckpt", sd1 / "model.ckpt", "--config", sd1 / "config.yaml")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--prompt", "a -- b"], "prompt", "a -- b"),
        (["--prompt="], "prompt", ""),
        (["--n_s", "4"], "n_samples", 4),
        (["--seed=7"], "seed", 7),
        (["--scale", "-1.5"], "scale", -1.5),
        (["--skip_g"], "skip_grid", True),
        (["--plms", "--dpm_solver", "--ddim_eta", "1"], "sampler", "dpmpp_2m"),
        (["--dpm_solver", "--ddim_eta", "1"], "eta", 0.0),
        (["--laion400m", "--outdir", "mine", "--ckpt", "mine"], "outdir", LAION_OUTDIR),
        (["--laion400m"], "config", LAION_CONFIG),
        (["--laion400m", "--ckpt", "mine"], "ckpt", LAION_CKPT),
        (["--laion400m"], "scale", 7.5),
    ],
)
def test_the_command_line_is_read_as_the_originals(arguments, name, value):
    assert getattr(parse_options(arguments), name) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plms", "--ddim_eta", "0.1"], "ddim_eta must be 0 for PLMS, and is 0.1"),
        (["--ddim_eta", "-1"], "--ddim_eta is -1.0; it must be 0 or more"),
        (["--prompt"], "--prompt has no value"),
        (["--n_iter", "0"], "--n_iter is 0; it must be 1 or more"),
        (["--seed", "-1"], "--seed is -1; it must be 0 to 4294967295"),
        (["--scale", "nan"], "--scale is nan"),
        (["--precision", "half"], "choose from 'full', 'autocast'"),
        (["--ddim-steps", "5"], "unrecognized arguments: --ddim-steps 5; see latentmill txt2img --help"),
        (["--ddim_steps", "27"], "num_inference_steps is 27.*the nearest number that does is 26"),
        (["--ddim_steps", "1001", "--dpm_solver"], "this model takes 1 to 1000"),
        (["--C", "4"], "--C is 4, but the model embedded has 8 latent channels; give --C 8"),
        (["--f", "8"], "--f is 8, but the model embedded has 16 pixels per cell; give --f 16"),
        (["--W", "15"], "--W is 15; it must be 16 or more, the pixels of one latent cell"),
        (["--H", "240"], "a picture of 256x240 is too small for the watermark"),
        (["--H", "64", "--W", "64", "--skip_save"], "the grid of 200x134 is too small"),
        (["--from-file", "nowhere.txt"], "--from-file nowhere.txt cannot be read"),
        (["--ckpt", "nowhere.ckpt"], "--ckpt nowhere.ckpt is not a file"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
        (["--laion400m"], "--ckpt models/ldm/text2img-large/model.ckpt is not a file"),
        (["--rng", "per-sample", "--seed", "4294967291"], "6 pictures pass the last seed, 4294967295"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(UsageError, match=message) as refused:
        plan(*arguments)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


def test_sizes_are_cut_to_whole_latent_cells_as_in_the_original(sd1):
    assert (plan("--H", 271, "--W", 300).height, plan("--H", 271, "--W", 300).width) == (256, 288)
    drawing = checkpoint(sd1, *SMALL, "--H", 67, "--W", 65, "--ddim_steps", 1)
    assert drawing.latent_shape == (2, 4, 67 // 4, 65 // 4)
    assert_the_originals(our_pictures(drawing), originals_pictures(sd1 / "folder", steps=1))


def test_nothing_is_too_small_for_a_mark_that_is_not_made():
    assert plan("--H", 64, "--W", 64, "--skip_save", "--skip_grid").height == 64


def test_steps_that_crashed_the_original_are_refused_and_no_others():
    def crashes(steps: int) -> bool:
        return max(range(0, 1000, 1000 // steps)) + 1 >= 1000

    def refused(steps: int, *arguments: str) -> bool:
        try:
            plan("--ddim_steps", steps, *arguments)
        except UsageError:
            return True
        return False

    numbers = [*range(1, 120), *range(250, 335), 499, 500, 501, 999, 1000]
    for sampler in ([], ["--plms"]):
        assert [steps for steps in numbers if refused(steps, *sampler)] == list(filter(crashes, numbers))
    assert not any(refused(steps, "--dpm_solver") for steps in (3, 27, 101, 999))


# Prompts


def test_lines_of_a_file_go_in_tuples_with_empty_ones_kept_and_a_short_last_one(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n  four \nfive\n")
    arguments = ("--from-file", tmp_path / "prompts.txt", "--n_iter", 3)
    assert plan(*arguments, "--n_samples", 2).batches == (("one", ""), ("three", "  four "), ("five",))
    assert plan(*arguments, "--n_samples", 2).count == 15
    assert plan(*arguments).batches == (("one", "", "three"), ("  four ", "five"))
    assert plan("--prompt", "a", "--n_samples", 2).batches == (("a", "a"),)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match="holds no line"):
        plan("--from-file", tmp_path / "empty.txt")


# Files


def picture(seed: int, height: int = 256, width: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_numbers_count_what_is_there_and_pass_over_what_is_taken(tmp_path):
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    for name in ("samples/a.txt", "samples/.hidden", "samples/00003.png", "grid-0000.png", "notes"):
        (out / name).write_text("mine")
    folder = OutputFolder(out)
    names = [folder.save_sample(picture(number, 8, 8)).name for number in range(3)]
    assert names == ["00004.png", "00005.png", "00006.png"]
    assert folder.save_grid(picture(0, 8, 8)).name == "grid-0002.png"
    assert (out / "samples/00003.png").read_text() == "mine"
    assert np.array_equal(read(out / "samples/00005.png"), picture(1, 8, 8))


def test_a_fresh_folder_starts_at_zero(tmp_path):
    folder = OutputFolder(tmp_path / "deep" / "out")
    assert folder.save_sample(picture(0)).relative_to(tmp_path) == Path("deep/out/samples/00000.png")
    assert folder.save_grid(picture(0)).name == "grid-0000.png"


def test_an_outdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        OutputFolder(tmp_path / "file")


@pytest.mark.parametrize(("count", "per_row"), [(1, 3), (2, 3), (3, 3), (5, 3), (7, 2), (4, 1), (6, 9)])
def test_the_grid_is_rows_of_pictures_with_two_black_pixels_around(count, per_row):
    pictures = [picture(number, 5, 4) for number in range(count)]
    if count == 1:
        expected = pictures[0]
    else:
        columns = min(per_row, count)
        missing = [np.zeros_like(pictures[0])] * (-count % columns)
        cells = [np.pad(cell, ((2, 0), (2, 0), (0, 0))) for cell in pictures + missing]
        rows = [np.concatenate(cells[start : start + columns], axis=1) for start in range(0, len(cells), columns)]
        expected = np.pad(np.concatenate(rows), ((0, 2), (0, 2), (0, 0)))
    assert np.array_equal(draw_grid(pictures, per_row), expected)
    assert grid_size(count, per_row, 4, 5) == expected.shape[1::-1]


# Noise and pixels


class Recorder:
    """In the engine's place: what it is asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[list[GenerationRequest], Any]] = []

    def generate(self, requests: list[GenerationRequest], *, noise: Any = None) -> list[None]:
        self.calls.append((requests, noise))
        return [None] * len(requests)


def originals_draws(sampler: str, steps: int, *, eta: float, fixed: bool, batches: int):
    """What the original's loops draw, in their order; of each batch, those draws that reach a pixel."""
    shape = (2, 8, 16, 16)
    torch.manual_seed(42)
    code = torch.randn(shape) if fixed else None
    for _ in range(batches):
        used = [torch.randn(shape) if code is None else code]
        if sampler == "dpm_solver":
            yield used
            continue
        for number, _ in enumerate(range(0, 1000, 1000 // steps)):
            if sampler == "plms" and number == 0:
                torch.randn(shape)  # its first step looks ahead
            step = torch.randn(shape)
            if eta > 0:
                used.append(step)
        yield used


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("sampler", "steps", "eta"), [("ddim", 4, 0.0), ("ddim", 6, 0.7), ("plms", 6, 0.0), ("dpm_solver", 4, 0.0)]
)
def test_legacy_noise_is_the_originals_draw_by_draw(sampler, steps, eta, fixed):
    arguments: list[object] = ["--n_samples", 2, "--n_iter", 3, "--ddim_steps", steps, "--ddim_eta", eta]
    arguments += [] if sampler == "ddim" else [f"--{sampler}"]
    drawing = plan(*arguments, *(["--fixed_code"] if fixed else []))
    recorder = Recorder()
    assert len(list(generate_batches(drawing, recorder))) == 3
    expected = list(originals_draws(sampler, steps, eta=eta, fixed=fixed, batches=3))
    assert len(expected[0]) == (1 if eta == 0 else 1 + 7)
    for (_, noise), draws in zip(recorder.calls, expected, strict=True):
        assert torch.equal(torch.stack(noise, dim=1), torch.stack(draws))


def test_a_short_last_batch_takes_as_much_noise_as_a_full_one(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    recorder = Recorder()
    arguments = ("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--n_iter", 2, "--ddim_steps", 2)
    assert [len(batch) for batch in generate_batches(plan(*arguments), recorder)] == [2, 1, 2, 1]
    starts = [draws[0] for draws in originals_draws("ddim", 2, eta=0.0, fixed=False, batches=4)]
    for (requests, noise), start in zip(recorder.calls, starts, strict=True):
        assert torch.equal(torch.stack(noise)[:, 0], start[: len(requests)])


@pytest.mark.slow
def test_per_sample_noise_is_that_of_the_job_runner(embedded):
    arguments = ("--n_samples", 2, "--ddim_steps", 2, "--ddim_eta", 1, "--rng", "per-sample", "--seed", 7)
    found = [result.pixels for batch in generate_batches(plan(*arguments), embedded) for result in batch]
    drawing = plan(*arguments)
    request = GenerationRequest(
        prompt=ARTICLE["prompt"], width=256, height=256, num_inference_steps=2, guidance_scale=7.5, eta=1.0
    )
    expected = embedded.generate([replace(request, seed=7 + k) for k in range(4)])
    assert all(np.array_equal(ours, theirs.pixels) for ours, theirs in zip(found, expected, strict=True))
    fixed = replace(drawing, options=replace(drawing.options, fixed_code=True))
    recorder = Recorder()
    list(generate_batches(fixed, recorder))
    assert [[request.seed for request in requests] for requests, _ in recorder.calls] == [[7, 8], [7, 8]]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--ddim_eta", "0.5", "--scale", "3"], {"eta": 0.5, "scale": 3.0}),
        (["--plms", "--ddim_steps", "6"], {"plms": True, "steps": 6}),
        (["--fixed_code", "--scale", "1"], {"fixed": True, "scale": 1.0}),
        (["--scale", "0.5"], {"scale": 0.5}),
    ],
)
@pytest.mark.slow
def test_pixels_are_the_originals_truncation_included(sd1, flags, settings):
    drawing = checkpoint(sd1, *SMALL, "--ddim_steps", 4, *flags)
    assert_the_originals(our_pictures(drawing), originals_pictures(sd1 / "folder", **settings))


# Safety


class Judge:
    """A checker whose verdicts are given, and that remembers what it saw."""

    def __init__(self, *verdicts: str | Exception) -> None:
        self.verdicts = iter(verdicts)
        self.seen: list[np.ndarray] = []

    def check(self, pixels: np.ndarray) -> SafetyVerdict:
        self.seen.append(pixels)
        verdict = next(self.verdicts)
        if isinstance(verdict, Exception):
            raise verdict
        return SafetyVerdict(checker="judge", score=0.5, flagged=verdict == "flag")


@pytest.fixture
def judged(embedded, monkeypatch) -> Callable[..., Judge]:
    def install(*verdicts: str | Exception) -> Judge:
        judge = Judge(*verdicts)
        monkeypatch.setattr(embedded, "_safety", judge)
        return judge

    return install


def test_the_checker_sees_rounded_pixels_and_cut_ones_are_saved(embedded, judged, tmp_path):
    judge = judged("pass", "pass")
    drawing = plan("--n_samples", 2, "--n_iter", 1, "--ddim_steps", 2)
    results = next(generate_batches(drawing, embedded))
    more = np.stack(judge.seen).astype(int) - np.stack([result.pixels for result in results])
    assert set(np.unique(more)) == {0, 1}
    assert 0.2 < more.mean() < 0.8


def test_what_is_not_passed_is_black_numbered_marked_and_saved(embedded, judged, tmp_path):
    judged("pass", "flag", RuntimeError("broken"), "pass")
    drawing = plan("--n_samples", 2, "--ddim_steps", 2, "--outdir", tmp_path / "out")
    summary = run_txt2img(drawing, embedded)
    assert [path.name for path in summary.samples] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    black = embed_watermark(np.zeros((256, 256, 3), np.uint8), "StableDiffusionV1", "dwtDct")
    assert [np.array_equal(read(path), black) for path in summary.samples] == [False, True, True, False]
    assert (summary.flagged, len(summary.failures), summary.exit_code) == (1, 1, 1)
    assert "broken" in summary.failures[0]


def test_flags_alone_are_no_failure(embedded, judged, tmp_path):
    judged("flag", "flag")
    drawing = plan("--n_samples", 2, "--n_iter", 1, "--ddim_steps", 2, "--outdir", tmp_path / "out")
    summary = run_txt2img(drawing, embedded)
    assert (summary.flagged, summary.exit_code) == (2, 0)


def test_the_checker_is_open_nsfw_unless_the_model_has_its_own(embedded):
    strict = plan("--n_samples", 2, "--n_iter", 1, "--ddim_steps", 2)
    strict = replace(strict, spec=replace(strict.spec, safety_threshold=0.0))
    results = next(generate_batches(strict, load_engine(strict)))
    assert [(result.safety.checker, result.safety.flagged) for result in results] == [("open-nsfw", True)] * 2


# The whole command


@pytest.mark.slow
def test_samples_and_grid_are_the_marked_pictures(embedded, tmp_path):
    arguments = ("--n_samples", 2, "--ddim_steps", 2, "--n_rows", 3, "--outdir", tmp_path / "out")
    done: list[int] = []
    summary = run_txt2img(plan(*arguments), embedded, on_batch=done.append)
    pictures = [result.pixels for batch in generate_batches(plan(*arguments), embedded) for result in batch]
    assert [
        np.array_equal(read(path), watermarked(one)) for path, one in zip(summary.samples, pictures, strict=True)
    ] == [True] * 4
    assert summary.grid == tmp_path / "out" / "grid-0000.png"
    assert np.array_equal(read(summary.grid), watermarked(draw_grid(pictures, 3)))
    assert done == [2, 4]
    assert run_txt2img(plan(*arguments), embedded).samples[0].name == "00004.png"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid-0000.png", "grid-0001.png", "samples"]


@pytest.mark.parametrize("skipped", ["--skip_save", "--skip_grid"])
def test_what_is_skipped_is_not_written(embedded, tmp_path, skipped):
    run_txt2img(plan("--n_samples", 2, "--n_iter", 1, "--ddim_steps", 1, "--outdir", tmp_path, skipped), embedded)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert found == (["grid-0000.png"] if skipped == "--skip_save" else ["samples/00000.png", "samples/00001.png"])


@pytest.mark.slow
def test_the_command_draws_with_the_embedded_model_and_says_what_it_can(tmp_path):
    """In a process of its own, as a user would start it, and without Ray."""
    script = (
        "import sys, cli\n"
        "sys.argv = ['latentmill', 'txt2img', '--prompt', 'a photograph of an astronaut riding a horse', '--plms',\n"
        "            '--ddim_steps', '4', '--n_iter', '1']\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('RAY' if 'ray' in sys.modules else 'no cluster')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert "embedded, 256x256" in first
    assert "cannot draw photographs" in first
    assert f"there is no {DEFAULT_CKPT} here" in first
    assert rest[-1] == "no cluster"
    out = tmp_path / "outputs" / "txt2img-samples"
    samples = sorted((out / "samples").iterdir())
    assert [path.name for path in samples] == ["00000.png", "00001.png", "00002.png"]
    assert read(samples[0]).shape == (256, 256, 3)
    assert read(out / "grid-0000.png").shape == (260, 3 * 258 + 2, 3)
    without = watermark_bit_accuracy(picture(1), "StableDiffusionV1", "dwtDct")
    assert watermark_bit_accuracy(read(samples[0]), "StableDiffusionV1", "dwtDct") > max(0.7, without)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object):
    monkeypatch.setattr(sys, "argv", ["latentmill", "txt2img", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.mark.slow
def test_the_command_draws_with_a_checkpoint_and_its_config(sd1, tmp_path, monkeypatch, capsys):
    model = ("--ckpt", sd1 / "model.ckpt", "--config", sd1 / "config.yaml", "--f", 4, "--H", 256, "--W", 256)
    few = ("--n_samples", 1, "--n_iter", 1, "--dpm_solver", "--prompt", "long " * 30)
    code, out, err = call(monkeypatch, capsys, *model, *few, "--ddim_steps", 1, "--outdir", tmp_path / "out")
    assert code == 0, err
    assert "(stable-diffusion), 256x256" in out
    assert "1 prompts were longer than the 75 tokens that this model reads; cut there" in out
    assert np.array_equal(read(tmp_path / "out/samples/00000.png"), read(tmp_path / "out/grid-0000.png"))


def test_the_canonical_command_draws_with_the_originals_checkpoint_where_it_is_there(
    sd1, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert plan().embedded
    config = small_config()
    config["model"]["params"]["cond_stage_config"]["params"]["tokenizer"] = str(sd1 / "folder")
    for name in (DEFAULT_CONFIG, DEFAULT_CKPT):
        (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / DEFAULT_CONFIG).write_text(yaml.safe_dump(config))
    (tmp_path / DEFAULT_CKPT).symlink_to(sd1 / "model.ckpt")
    few = ("--H", 256, "--W", 256, "--n_samples", 1, "--n_iter", 1, "--ddim_steps", 1, "--plms", "--f", 4)
    code, out, err = call(monkeypatch, capsys, "--prompt", "a photograph of an astronaut riding a horse", *few)
    assert code == 0, err
    assert out.startswith(f"model: {DEFAULT_CKPT} (stable-diffusion), 256x256\n")


@pytest.mark.slow
def test_laion400m_draws_with_the_files_at_the_originals_places(tmp_path, monkeypatch, capsys):
    """The checkpoint has the published key names and small widths; a config in the working folder is taken first."""
    config = yaml.safe_load((ROOT / LAION_CONFIG).read_text())
    params = config["model"]["params"]
    params["unet_config"]["params"] = {"model_channels": 32, "channel_mult": [1, 2, 2], "context_dim": 64}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 1, 2]}
    params["cond_stage_config"]["params"] = {"n_embed": 64, "n_layer": 2, "tokenizer": str(tmp_path / "folder")}
    for name in (LAION_CONFIG, LAION_CKPT):
        (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / LAION_CONFIG).write_text(yaml.safe_dump(config))
    write_ckpt(write_ldm(tmp_path / "folder"), tmp_path / LAION_CKPT, changes={"alphas_cumprod": own_schedule()})
    monkeypatch.chdir(tmp_path)
    few = ("--H", 256, "--W", 256, "--n_samples", 1, "--n_iter", 1, "--ddim_steps", 2, "--scale", 5, "--plms")
    code, out, err = call(monkeypatch, capsys, "--laion400m", *few)
    assert code == 0, err
    assert out.startswith(f"Falling back to LAION 400M model...\nmodel: {LAION_CKPT} (latent-diffusion), 256x256\n")
    assert (tmp_path / LAION_OUTDIR / "samples" / "00000.png").is_file()


def test_help_lists_every_option_and_the_differences(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0
    assert all(f"--{name}" in out for name in (*ARTICLE, "dpm_solver", "rng"))
    assert all(words in out for words in ("differs from the original", "the original crashed", "black one"))
    assert all(words in out for words in ("parameterization: x0", "--ddim_eta above 1", "refused by name"))


def test_an_option_at_fault_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "--plms", "--ddim_eta", "1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ddim_eta must be 0 for PLMS")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_where_what_was_saved_is(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("latentmill.jobs.txt2img.drawing.run_txt2img", interrupted)
    code, _, err = call(monkeypatch, capsys, "--outdir", tmp_path / "out")
    assert code == 130
    assert f"interrupted; what was saved stays in {tmp_path / 'out'}" in err


def test_the_embedded_model_is_the_shipped_one():
    assert plan().model.path == EMBEDDED_MODEL
    assert plan().latent_shape == (3, 8, 16, 16)
