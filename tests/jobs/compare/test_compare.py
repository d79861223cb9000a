"""Two published datasets: what is the same, what changed, what is new or gone, and which nights are compared."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import latentmill
from latentmill import cli
from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.compare import compare as compare_module
from latentmill.jobs.compare.compare import CompareError, compare
from latentmill.jobs.compare.distance import Distance, distance
from latentmill.jobs.ledger.picture_store import PictureStore
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.store.storage import Storage
from tests.engine.loras import random_terms, write_kohya
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import FakeEngine, fake_pixels
from tests.jobs.outputs.test_latest import dated_spec

Manifest = Callable[..., Path]
PROMPTS = ["a cat", "a dog", "a tree", "some nsfw", "some poison"]


class ChangedEngine(FakeEngine):
    """Another version of the model: `a dog` has one more in each value, `a tree` is another picture, nsfw is not."""

    def _result(self, request: GenerationRequest, slot: int) -> GenerationResult:
        result = super()._result(request, slot)
        pixels = fake_pixels(request)
        if "dog" in request.prompt:
            result = replace(result, pixels=np.minimum(pixels, 254) + 1)
        if "tree" in request.prompt:
            result = replace(result, pixels=255 - pixels)
        if "nsfw" in request.prompt:
            result = replace(result, safety=replace(result.safety, score=0.0, flagged=False))
        return result


def changed_engine(plan: Plan, device: str) -> ChangedEngine:
    return ChangedEngine(batch_size=plan.batch_size)


@pytest.fixture(scope="module")
def nights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two outputs of one job by two versions of a model."""
    folder = tmp_path_factory.mktemp("nights")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name, engine in (("before", None), ("after", changed_engine)):
        options = {} if engine is None else {"engine_factory": engine}
        run(job_spec(tiny_model, folder / "prompts.txt", folder / name), **options)
    return str(folder / "before"), str(folder / "after")


def call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        call_main(*arguments)
    said = capsys.readouterr()
    return int(str(ended.value.code or 0)), said.out, said.err


def call_main(*arguments: str) -> None:
    import sys

    before, sys.argv = sys.argv, ["latentmill", *arguments]
    try:
        cli.main()
    finally:
        sys.argv = before


def test_each_sample_is_the_same_changed_new_or_gone_and_the_biggest_change_is_first(nights: tuple[str, str]):
    found = compare(*nights, top=200)
    told = found.to_dict()
    assert {name: told[name] for name in ("identical", "changed", "added", "removed")} == {
        "identical": 2,
        "changed": 3,
        "added": 0,
        "removed": 0,
    }
    assert [pair["prompt"] for pair in told["pairs"]] == ["some nsfw", "a tree", "a dog"]
    assert [pair["differs"] for pair in told["pairs"]] == [{}] * 3
    flagged, tree, dog = found.pairs
    assert (flagged.before["status"], flagged.after["status"]) == ("flagged", "ok")
    one, other = (latentmill.open_dataset(out) for out in nights)
    apart = distance(np.asarray(one.image(2)), np.asarray(other.image(2)))
    assert tree.distance == apart
    assert told["pairs"][1]["perceptual_distance"] == apart.perceptual
    assert dog.distance is not None
    assert dog.distance.greatest == 1
    assert dog.distance.perceptual < 0.01 < tree.distance.perceptual
    assert found.exit_code == 1


def test_a_dataset_is_the_same_as_itself_and_no_picture_is_read(nights: tuple[str, str], monkeypatch):
    monkeypatch.delattr(PictureStore, "read")
    found = compare(nights[0], nights[0], top=5)
    assert (found.identical, found.exit_code, found.settings) == (5, 0, ())


def test_only_changed_pairs_are_read(nights: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    real = PictureStore.read
    monkeypatch.setattr(PictureStore, "read", lambda self, path, *rest: (read.append(path), real(self, path, *rest))[1])
    compare(*nights, top=200)
    assert len(read) == 6


def test_what_is_within_the_tolerance_counts_as_unchanged_but_another_status_never(nights: tuple[str, str]):
    found = compare(*nights, top=200, tolerance=0.01)
    assert (found.identical, found.within_tolerance, found.changed) == (2, 1, 2)
    assert [pair.after["prompt"] for pair in found.pairs] == ["some nsfw", "a tree"]
    found = compare(*nights, top=200, tolerance=2)
    assert [pair.after["prompt"] for pair in found.pairs] == ["some nsfw"]
    assert found.exit_code == 1


def test_top_bounds_what_is_listed_and_not_what_is_counted(nights: tuple[str, str]):
    found = compare(*nights, top=1)
    assert (found.changed, [pair.after["prompt"] for pair in found.pairs]) == (3, ["some nsfw"])
    assert compare(*nights, top=0).pairs == ()


def test_two_runs_that_differ_in_one_value(tiny_model: Path, manifest: Manifest, tmp_path: Path):
    prompts = manifest(["a cat", "a dog"])
    run(job_spec(tiny_model, prompts, tmp_path / "a", sweep={"guidance_scale": [3, 5]}))
    run(job_spec(tiny_model, prompts, tmp_path / "b", sweep={"guidance_scale": [3, 6]}))
    outs = (str(tmp_path / "a"), str(tmp_path / "b"))
    found = compare(*outs, top=200)
    # seeds follow from a sample's place, which is the same
    assert (found.identical, found.changed, found.added, found.removed) == (2, 0, 2, 2)
    assert {row["guidance_scale"] for row in found.added_rows} == {6}
    assert {row["guidance_scale"] for row in found.removed_rows} == {5}
    assert any(line.startswith("sweep guidance_scale: '3.0,5.0' -> '3.0,6.0'") for line in found.settings)
    ignoring = compare(*outs, top=200, ignored=["guidance_scale"])
    assert (ignoring.identical, ignoring.changed, ignoring.added, ignoring.removed) == (2, 2, 0, 0)
    assert [pair["differs"] for pair in ignoring.to_dict()["pairs"]] == [{"guidance_scale": [5.0, 6.0]}] * 2


class OfModel(FakeEngine):
    """Pictures follow from the request and from the model's files."""

    tint: int

    def _result(self, request: GenerationRequest, slot: int) -> GenerationResult:
        result = super()._result(request, slot)
        assert result.pixels is not None
        return replace(result, pixels=result.pixels // 2 + np.uint8(self.tint))


def engine_of_model(plan: Plan, device: str) -> OfModel:
    engine = OfModel(batch_size=plan.batch_size)
    engine.tint = int(plan.model.digest[:2], 16) // 2
    return engine


@pytest.fixture
def three_models(tiny_model: Path, tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a model to a place, another one for each letter."""

    def write(name: str, letter: str) -> str:
        place = tmp_path / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tiny_model, place)
        config = place / "scheduler/scheduler_config.json"
        config.write_text(config.read_text().replace("0.00085", f"0.0008{ord(letter) - ord('a')}"))
        return str(place)

    return write


@pytest.mark.long
def test_in_a_sweep_over_models_each_row_meets_that_of_the_same_model(three_models, manifest: Manifest, tmp_path: Path):
    a, b, c = (three_models(letter, letter) for letter in "abc")
    prompts = manifest(2)

    def made(out: str, *models: str) -> str:
        spec = job_spec(a, prompts, tmp_path / out, sweep={"model": list(models), "seed": [1]})
        assert run(spec, engine_factory=engine_of_model).exit_code == 0
        return spec.out

    last = made("last", a, b)
    found = compare(last, made("turned", b, a), top=9)
    assert (found.identical, found.changed, found.added, found.removed) == (4, 0, 0, 0)
    found = compare(last, made("other", a, c), top=9)
    assert (found.identical, found.changed, found.added, found.removed) == (2, 0, 2, 2)
    assert {row["model"] for row in found.to_dict()["added_samples"]} == {c}
    assert {row["model"] for row in found.to_dict()["removed_samples"]} == {b}
    three_models("b", "d")
    found = compare(last, made("tonight", a, b), top=9)
    assert (found.identical, found.changed, found.added, found.removed) == (2, 2, 0, 0)
    assert {(pair.before["model"], pair.after["model"]) for pair in found.pairs} == {(b, b)}
    said = [line for line in found.settings if line.startswith(f"model {b}: ")]
    assert len(said) == 1
    assert not any(line.startswith(f"model {a}: ") for line in found.settings)


def test_two_jobs_of_one_model_each_are_compared_whatever_it_is_called(
    three_models, manifest: Manifest, tmp_path: Path
):
    a, b = (three_models(letter, letter) for letter in "ab")
    for model, out in ((a, "one"), (b, "other")):
        run(job_spec(model, manifest(2), tmp_path / out), engine_factory=engine_of_model)
    found = compare(str(tmp_path / "one"), str(tmp_path / "other"), top=9)
    assert (found.changed, found.added, found.removed) == (2, 0, 0)
    assert found.settings[0].startswith(f"model: {a} (")
    assert f") -> {b} (" in found.settings[0]
    sweep = job_spec(a, manifest(2), tmp_path / "both", sweep={"model": [a, b]})
    run(sweep, engine_factory=engine_of_model)
    found = compare(str(tmp_path / "one"), sweep.out, top=9, ignored=["seed"])
    assert (found.identical + found.changed, found.added, found.removed) == (2, 2, 0)
    assert {row["model"] for row in found.added_rows} == {b}


def test_images_count_by_their_bytes_with_strength_and_mask(tiny_model: Path, tmp_path: Path):
    def made(name: str, *rows: dict[str, Any]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": "one", "seed": 1, **row}) + "\n" for row in rows))
        assert run(job_spec(tiny_model, path, tmp_path / name)).exit_code == 0
        return str(tmp_path / name)

    for name, colour in {"a": "red", "copy": "red", "b": "blue", "mask": "white"}.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    last = made("last", {}, {"image": "a.png"}, {"image": "a.png", "mask": "mask.png"})
    moved = made("moved", {"image": "copy.png", "mask": "mask.png"}, {}, {"image": "copy.png"})
    found = compare(last, moved, top=9)
    assert (found.identical + found.changed, found.added, found.removed) == (3, 0, 0)
    others = made("others", {}, {"image": "a.png", "strength": 0.5}, {"image": "b.png", "mask": "mask.png"})
    found = compare(last, others, top=9)
    assert (found.identical, found.changed, found.added, found.removed) == (1, 0, 2, 2)
    assert sorted(Path(row["init_image"]).name for row in found.to_dict()["added_samples"]) == ["a.png", "b.png"]
    found = compare(last, others, top=9, ignored=["image", "strength"])
    assert (found.identical, found.changed, found.added, found.removed) == (1, 2, 0, 0)
    # a dataset that never had images matches those rows that have none
    found = compare(made("plain", {}), last, top=9)
    assert (found.identical, found.changed, found.added, found.removed) == (1, 0, 2, 0)


@pytest.mark.long
def test_scales_of_loras_count_and_their_files_are_compared(tiny_model: Path, manifest: Manifest, tmp_path: Path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    files = [tmp_path / "ink-1.safetensors", tmp_path / "ink-2.safetensors"]
    for seed, path in enumerate(files):
        write_kohya(path, {"lora_unet": random_terms(unet, seed)})
    prompts = manifest(1)

    def made(out: str, file: Path | None, *scales: float) -> str:
        given: dict[str, Any] = {"lora": [f"ink={file}"], "sweep": {"lora.ink": list(scales)}} if file else {}
        spec = job_spec(tiny_model, prompts, tmp_path / out, **{"sweep": {}} | given)
        run(replace(spec, sweep=dict(spec.sweep) | {"seed": [1]}))
        return spec.out

    last = made("last", files[0], 0, 0.5, 1)
    found = compare(last, made("tonight", files[1], 0, 0.5, 0.8), top=9)
    assert (found.identical + found.changed, found.added, found.removed) == (2, 1, 1)
    assert [row["loras"] for row in found.added_rows] == ["ink:0.8"]
    assert any("model file loras/ink/" in line for line in found.settings)
    plain = made("plain", None)
    found = compare(plain, last, top=9)
    assert (found.identical + found.changed, found.added, found.removed) == (1, 2, 0)
    assert compare(plain, made("all", files[0], 1), top=9, ignored=["loras"]).added == 0


def test_a_column_of_the_manifest_that_is_called_as_ours_is_none_of_ours(tiny_model: Path, tmp_path: Path):
    """An output without images may carry a column of that name along."""
    for name, digest in (("one", "x"), ("other", "y")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"prompt": "one", "seed": 1, "init_image_sha256": digest, "mask_sha256": digest}))
        run(job_spec(tiny_model, path, tmp_path / name))
    found = compare(str(tmp_path / "one"), str(tmp_path / "other"), top=9)
    assert (found.identical, found.added, found.removed) == (1, 0, 0)


def test_an_output_of_an_older_format_is_compared(nights: tuple[str, str], tmp_path: Path):
    """Its rows do not say their model; its plan does."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "outputs/data/format2.zip") as packed:
        packed.extractall(tmp_path / "old")
    (plan,) = tmp_path.glob("**/_job/plan.json")
    old = str(plan.parents[1])
    found = compare(old, nights[0], top=9)
    assert (found.identical, found.changed, found.added) == (0, 0, 5)
    (model,) = {row["model"] for row in found.to_dict()["removed_samples"]}
    assert model == json.loads(plan.read_text())["model"]["source"]
    assert compare(old, old, top=9).exit_code == 0


def test_the_command_says_what_tells_new_and_gone_samples_apart(
    tiny_model: Path, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, scales in (("a", [3, 5]), ("b", [3, 6])):
        run(job_spec(tiny_model, manifest(["a cat"]), tmp_path / name, sweep={"guidance_scale": scales, "seed": [7]}))
    capsys.readouterr()
    code, out, _ = call("compare", str(tmp_path / "a"), str(tmp_path / "b"), capsys=capsys)
    words = " ".join(out.split())
    assert code == 1
    assert "sample row guidance_scale prompt" in words, "and not the seed, which is that of all"
    assert "00000001 1 6 a cat" in words
    assert "00000001 1 5 a cat" in words


def test_the_command_says_it_in_numbers_for_machines_and_by_its_exit_code(nights, capsys: pytest.CaptureFixture[str]):
    code, out, _ = call("compare", *nights, "--json", "--quiet", capsys=capsys)
    told = json.loads(out)
    assert (code, told["identical"], told["changed"], told["added"], told["removed"]) == (1, 2, 3, 0, 0)
    code, out, _ = call("compare", nights[0], nights[0], capsys=capsys)
    assert (code, out.splitlines()[0]) == (0, "the same")
    code, out, _ = call("compare", *nights, capsys=capsys)
    assert code == 1
    assert "changed (first 3 of 3)" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["BEFORE", "nowhere"], "has no plan"),
        (["BEFORE"], "is not named by a day, and there is no pointer"),
        (["BEFORE", "AFTER", "--top", "-1"], "top is -1; give 0 to 10,000"),
        (["BEFORE", "AFTER", "--tolerance", "3"], "tolerance is 3; give 0 to 2"),
        (["BEFORE", "AFTER", "--tolerance", "nan"], "tolerance is nan; give 0 to 2"),
        (["BEFORE", "AFTER", "--ignore", "guidance"], "did you mean 'guidance_scale'?"),
        (["BEFORE", "AFTER", "--ignore", "width"], "ignore 'width' is no parameter that can be left out"),
    ],
)
def test_what_cannot_be_compared_ends_with_exit_code_2(
    arguments: list[str], why: str, nights, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"BEFORE": nights[0], "AFTER": nights[1]}
    code, _, err = call("compare", *(places.get(word, word) for word in arguments), "--quiet", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert why in err


def test_an_unfinished_output_and_a_damaged_picture_are_errors_with_a_remedy(nights: tuple[str, str], tmp_path: Path):
    copy = shutil.copytree(nights[1], tmp_path / "copy")
    (picture,) = copy.glob("images/*/*/00000002.png")
    picture.write_bytes(picture.read_bytes()[:-1] + b"?")
    with pytest.raises(CompareError, match=r"00000002\.png in .* cannot be compared: .* latentmill repair"):
        compare(nights[0], str(copy), top=1)
    (copy / "_job/dataset.json").unlink()
    with pytest.raises(CompareError, match="has no published dataset"):
        compare(nights[0], str(copy), top=1)


def _files(folder: str) -> dict[str, str]:
    storage = Storage.open(folder)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list("")}


def test_nothing_is_written(nights: tuple[str, str]):
    before = [_files(night) for night in nights]
    compare(*nights, top=10)
    assert [_files(night) for night in nights] == before


def days(*numbers: int) -> list[datetime.date]:
    return [datetime.date(2026, 11, number) for number in numbers]


def test_tonight_is_compared_with_the_night_before(tiny_model: Path, manifest: Manifest, s3: str):
    for day, rows in zip(days(19, 20, 24), (1, 2, 3), strict=True):
        run(dated_spec(tiny_model, manifest(rows), f"{s3}/sweep/{{date}}", day))
    for place in ("latest", "latest.json", "2026-11-24", "2026-11-24/"):
        found = compare(f"{s3}/sweep/{place}", None, top=10)
        assert (found.before.url, found.after.url) == (f"{s3}/sweep/2026-11-20", f"{s3}/sweep/2026-11-24")
        assert (found.identical, found.added, found.removed) == (2, 1, 0)
    found = compare(f"{s3}/sweep/2026-11-19", f"{s3}/sweep/latest", top=10)
    assert (found.before.url, found.identical, found.added) == (f"{s3}/sweep/2026-11-19", 1, 2)
    with pytest.raises(CompareError, match=r"no published output before .*2026-11-19, in 100 days"):
        compare(f"{s3}/sweep/2026-11-19", None, top=10)


def test_a_pointer_with_a_name_of_its_own_and_one_that_lies(tiny_model: Path, manifest: Manifest, tmp_path: Path):
    for day in days(23, 24):
        run(dated_spec(tiny_model, manifest(1), f"{tmp_path}/sweep/nightly-{{date}}", day))
    pointer = tmp_path / "sweep/nightly-latest.json"
    told: dict[str, Any] = json.loads(pointer.read_text())
    pointer.write_text(json.dumps(told | {"out": "/etc"}))  # only the day is taken from it
    found = compare(f"{tmp_path}/sweep/nightly-latest", None, top=10)
    assert found.after.url == f"{tmp_path}/sweep/nightly-2026-11-24"
    assert found.before.url == f"{tmp_path}/sweep/nightly-2026-11-23"
    pointer.write_text("{")
    with pytest.raises(CompareError, match="there is no pointer"):
        compare(f"{tmp_path}/sweep/nightly-latest", None, top=10)


def test_memory_holds_a_few_pairs_however_many_changed(monkeypatch: pytest.MonkeyPatch):
    """All pictures together would take 100 MB."""
    pairs = 4000

    class Endless:
        def rows(self, numbers: list[int], _: object) -> list[dict[str, Any]]:
            return [{"image": "picture", "status": "ok"} for _ in numbers]

        def picture(self, _: object) -> np.ndarray:
            return np.ones((64, 64, 3), np.uint8)

    monkeypatch.setattr(compare_module, "_BLOCK", 512)
    monkeypatch.setattr(compare_module, "distance", lambda *_: Distance(pixel=1, greatest=1, perceptual=1))
    side: Any = Endless()
    tracemalloc.start()
    try:
        count = sum(1 for _ in compare_module._pairs(side, side, np.zeros((pairs, 2), np.int64)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == pairs
    assert most < 4 << 20
