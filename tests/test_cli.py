"""The command as a user meets it: help, answers, errors of one line, exit codes, and what happens on Ctrl-C."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from latentmill import cli
from latentmill.engine import embed_watermark
from latentmill.jobs.outputs.failures import FailedRow
from latentmill.jobs.runner import RunSummary

ROOT = Path(__file__).parents[1]
VERBS = ["plan", "run", "submit", "status", "logs", "cancel", "verify", "report", "clean", "export", "push-to-hub"]
VERBS += ["compare", "score", "models", "inspect"]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command here; returns exit code, standard output, and standard error without the progress lines."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentmill", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, "".join(complaints(err))

    return run


def complaints(err: str) -> list[str]:
    lines = err.splitlines(keepends=True)
    return [line for line in lines if not line.startswith(("latentmill: ", "[transformers]", "Writing model"))]


@pytest.fixture
def job(tiny_model: Path, manifest, tmp_path: Path) -> list[object]:
    """Arguments of a small job on the inline executor, 6 samples in 3 chunks, into tmp_path/out."""
    small = ["--width", 64, "--height", 64, "--num-inference-steps", 2, "--chunk-size", 2, "--batch-size", 2]
    rest = ["--watermark", "none", "--safety", "none", "--executor", "inline"]
    return [manifest(6), "--out", tmp_path / "out", "--model", tiny_model, *small, *rest]


def start(*arguments: object, cwd: Path = ROOT, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, "-m", "latentmill", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(call: Call, verb: str):
    code, out, err = call(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Example: latentmill {verb}" in " ".join(out.split())


def test_help_is_grouped_and_comes_at_once(call: Call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(group in out for group in ("Make images", "Look at a dataset", "More"))
    _, flags, _ = call("run", "--help")
    assert all(f"--{name}" in flags for name in ("config", "out", "sweep", "guidance-scale", "on-flagged", "address"))
    assert "Where it runs" in flags
    before = cpu_seconds_of_children()
    process = start("run", "--help")
    process.communicate()
    assert process.returncode == 0
    assert cpu_seconds_of_children() - before < 0.7


def cpu_seconds_of_children() -> float:
    """Processor time, which unlike the clock does not depend on what else the machine is doing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_flag_is_a_key_of_the_job_file_and_the_other_way_round():
    from latentmill.jobs.spec import SETTINGS

    run = typer.main.get_command(cli.app).commands["run"]
    flags = {parameter.name for parameter in run.params} - {"config", "json", "quiet", "help"}
    assert flags == set(SETTINGS)


def test_the_whole_way_and_back(call: Call, job: list[object], tmp_path: Path):
    out_folder = tmp_path / "out"
    code, out, err = call("plan", *job, "--json")
    assert (code, err) == (0, "")
    assert (json.loads(out)["samples"], json.loads(out)["chunks"]) == (6, 3)
    assert not out_folder.exists()
    assert "6" in call("plan", *job)[1]

    code, out, err = call("run", *job)
    assert (code, err) == (0, "")
    assert "6 ok, 0 flagged, 0 failed" in out
    assert f"latentmill report {out_folder}" in out

    code, out, _ = call("run", *job, "--json")
    assert (code, json.loads(out)["generated"]) == (0, 0)

    code, out, _ = call("status", out_folder, "--json")
    assert (code, json.loads(out)["state"]) == (0, "published")
    assert "3 of 3 committed" in call("status", out_folder)[1]
    assert call("verify", out_folder)[0] == 0
    code, out, _ = call("report", out_folder, "--json")
    assert json.loads(out)["sheets"] == ["report/sheet-0001.png"]

    code, out, err = call("run", *job, "--seed", 7)
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "seed: 42 -> 7" in err

    picture = next(out_folder.glob("images/*/*/*.png"))
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)
    code, out, _ = call("verify", out_folder, "--json")
    assert (code, json.loads(out)["defects"][0]["kind"]) == (1, "image-damaged")
    assert "image-damaged" in call("verify", out_folder)[1]


def test_flags_override_the_job_file(call: Call, job: list[object], tmp_path: Path):
    config = tmp_path / "job.yaml"
    config.write_text("guidance_scale: 3\nseed: 5\nsweep: {eta: [0, 0.5]}\n")
    _, out, _ = call("plan", *job, "--config", config, "--seed", 9, "--sweep", "guidance_scale=1,2", "--json")
    plan = json.loads(out)
    assert plan["parameters"]["seed"] == 9
    assert plan["parameters"]["guidance_scale"] == 3
    assert plan["axes"] == {"eta": [0.0, 0.5], "guidance_scale": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt"], "missing.txt"),
        (["{empty}"], "empty.txt is empty"),
        (["--config", "{bare}"], "no manifest is named"),
        (["{good}", "--model", "embeded"], "embedded"),
        (["{good}", "--sampler", "dim"], "ddim"),
        (["{good}", "--width", "100"], "100"),
        (["{good}", "--width", "100000"], "100000"),
        (["{good}", "--sweep", "seeds=1,2"], "seed"),
        (["{good}", "--config", "{typo}"], "guidance_scale"),
        (["{good}", "--out", "ftp://host/x"], "ftp"),
        (["{good}", "--out", "/proc/latentmill"], "/proc/latentmill"),
        (["{good}", "--on-flagged", "show"], "blank"),
        (["\x1b[2J\u202e.txt"], "\\x1b[2J\\u202e.txt"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    files = {"good": "a red circle\n", "empty": "", "typo": "guidance_scal: 3\n", "bare": "seed: 3\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    arguments = [argument.format(**{name: f"{name}.txt" for name in files}) for argument in arguments]
    code, out, err = call("run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert "\x1b" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.txt", "empty.txt", "good.txt", "typo.txt"]


@pytest.mark.parametrize(
    "arguments",
    [["run", "--colour"], ["fly"], ["run", "x", "--seed", "many"], ["status"], ["verify", "x", "--sample", "0"]],
)
def test_wrong_usage_exits_with_two_and_without_a_traceback(call: Call, arguments: list[str]):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Error" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "x.txt", "--format", "files"], "pictures are always files"),
        (["run", "x.txt", "--dry-run"], "`latentmill plan` takes the same flags"),
        (["run", "x.txt", "--steps", "3"], "--num-inference-steps"),
        (["plan", "x.txt", "--cfg=3"], "--guidance-scale"),
        (["plan", "x.txt", "--neg", "x"], "--negative-prompt"),
        (["submit", "x.txt", "--output", "x"], "--out)"),
        (["run", "x.txt", "--n", "2"], "--num-images"),
        (["run", "x.txt", "--sead", "2"], "--seed"),
    ],
)
def test_the_flag_that_was_meant_is_named(call: Call, arguments: list[str], words: str):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "missing.txt"], "missing.txt does not exist"),
        (["run", "missing.txt"], "missing.txt does not exist"),
        (["status", "nowhere"], "has no plan"),
        (["run", "x.txt", "--steps", "3"], "--num-inference-steps"),
        (["inspect", "missing.png"], "missing.png does not exist"),
    ],
)
def test_with_json_a_refusal_is_json_too(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(*arguments, "--json")
    answer = json.loads(out)
    assert (code, answer["exit_code"], answer.keys()) == (2, 2, {"error", "exit_code"})
    assert words in answer["error"]


@pytest.mark.slow
def test_quiet_leaves_warnings_and_errors(call: Call, job: list[object], tmp_path: Path):
    (tmp_path / "m.csv").write_text("prompt,sede\na,1\n")
    quiet = [tmp_path / "m.csv", *job[1:], "--quiet"]
    code, out, err = call("plan", *quiet)
    assert (code, out, err.count("\n")) == (0, "", 1)
    assert "'sede'" in err
    process = start("run", *quiet)
    out, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if line.startswith("latentmill: ")]
    assert (process.returncode, out, len(said)) == (0, "", 1), err
    assert "'sede'" in said[0]
    assert call("verify", tmp_path / "out", "-q")[:2] == (0, "")
    assert json.loads(call("run", *quiet, "--json")[1])["notes"] == [said[0].removeprefix("latentmill: ")]
    assert call("plan", tmp_path / "missing.txt", "-q")[2].startswith("error: ")


def test_plan_tells_rows_from_defaults_and_names_what_is_carried(call: Call, job: list[object], tmp_path: Path):
    (tmp_path / "m.csv").write_text("prompt,seed,guidance_scale,mood,cfg,id\na,1,2,x,9,i\nb,,,y,9,i\n")
    _, out, _ = call("plan", tmp_path / "m.csv", *job[1:])
    lines = dict(line.strip().split(": ", 1) for line in out.splitlines() if ": " in line)
    assert lines["from rows"].startswith("seed (where empty: 42 and on), guidance_scale (where empty: ")
    assert "seed" not in lines["parameters"]
    assert "guidance_scale" not in lines["parameters"]
    assert "num_inference_steps 2" in lines["parameters"]
    assert lines["carried"] == "mood, cfg"
    assert "note: column 'cfg'" in out
    assert "note: duplicate ids: 1 of 2 rows" in out


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
@pytest.mark.parametrize(
    ("data", "carried"),
    [
        (b"a red circle\na blue circle\n", []),
        (b"tag,prompt\nx,a red circle\ny,a blue circle\n", ["tag"]),
        (b'{"prompt": "a red circle"}\n{"prompt": "a blue circle"}\n', []),
        (b'["a red circle", "a blue circle"]', []),
        (b"one prompt\rwith the line ends of an old Mac\ra second prompt\nanother\n", []),
        (gzip.compress(b"prompt\ttag\na red circle\tx\na blue circle\ty\n"), ["tag"]),
    ],
    ids=["lines", "csv", "jsonl", "json", "carriage-returns", "tsv.gz"],
)
def test_a_manifest_comes_from_standard_input(
    call: Call, job: list[object], monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, carried: list[str]
):
    from latentmill.jobs.manifests import standard_input

    standard_input.spooled_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, out, _ = call("plan", name, *job[1:], "--json")
    standard_input.spooled_input.cache_clear()
    plan = json.loads(out)
    assert (code, plan["samples"], plan["carried_columns"]) == (0, 2, carried)
    assert plan["sources"] == ["standard input"]


def test_standard_input_makes_the_plan_of_the_same_file_and_leaves_nothing(
    call: Call, job: list[object], tmp_path: Path
):
    assert call("run", *job)[0] == 0
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-m", "latentmill", "run", "-", *map(str, job[1:]), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")}
    with Path(str(job[0])).open("rb") as prompts:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdin=prompts, capture_output=True, check=True)
    assert json.loads(done.stdout)["generated"] == 0
    assert list((tmp_path / "scratch").glob("latentmill-plan-*")) == []


def test_a_run_without_prompts_begins_with_the_sample_and_says_so(call: Call, job: list[object]):
    code, out, _ = call("plan", *job[1:])
    assert code == 0
    assert "rows: 24 valid" in out
    assert "note: these are the sample prompts" in out


@pytest.mark.parametrize("verb", ["status", "verify", "report", "clean"])
def test_an_output_without_a_plan_is_refused(call: Call, tmp_path: Path, verb: str):
    code, _, err = call(verb, tmp_path)
    assert code == 2
    assert "has no plan" in err
    assert err.count("\n") == 1


def test_failed_samples_and_interruption_have_their_codes(call: Call, monkeypatch: pytest.MonkeyPatch):
    summary = {"out": "o", "executor": "x", "samples": 2, "rejected_rows": 0, "generated": 1, "seconds": 1.0}
    summary |= {"images_per_second": 1.0, "next_command": "latentmill report o"}
    failed = FailedRow(sample_id="00000001", row_id="evil", prompt="\x1b[2J" + "p" * 200, error="too long")
    ends = {
        1: RunSummary(exit_code=1, counts={"ok": 1, "flagged": 0, "failed": 1}, failures=(failed,), **summary),
        130: RunSummary(exit_code=130, counts=None, failures=(), **summary),
    }
    for code, end in ends.items():
        monkeypatch.setattr("latentmill.jobs.runner.run_job", lambda *_args, end=end, **_options: end)
        got, out, _ = call("run", "prompts.txt", "--out", "o o")
        assert got == code
        assert ("1 failed" if code == 1 else "latentmill run prompts.txt --out 'o o'\n") in out
        assert ("latentmill run prompts.txt --out 'o o' --retry-failed\n" in out) == (code == 1)
        assert ("failed samples (first 1 of 1)" in out) == (code == 1)
        assert "\x1b" not in out
        if code == 1:
            assert "too long" in out
            again = call("run", "prompts.txt", "--retry-failed", "--json")
            assert json.loads(again[1])["failures"][0]["error"] == "too long"
            assert (
                "failed only: latentmill run prompts.txt --retry-failed\n"
                in call("run", "prompts.txt", "--retry-failed")[1]
            )


def test_a_mistake_of_ours_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("latentmill.jobs.submission.submission.job_status", broken)
    with pytest.raises(ZeroDivisionError):
        call("status", "x")


def test_models_and_version(call: Call):
    code, out, _ = call("models", "--json")
    assert (code, json.loads(out)["embedded"]["width"]) == (0, 256)
    assert "embedded" in call("models")[1]
    for flag in ("--version", "-V"):
        code, out, _ = call(flag)
        assert (code, out.split()[0]) == (0, "latentmill")


def test_watermarks_are_read_back_from_pictures(call: Call, tmp_path: Path):
    ramp = np.linspace(0, 255, 256, dtype=np.uint8)
    plain = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=2)
    Image.fromarray(plain).save(tmp_path / "plain.png")
    Image.fromarray(embed_watermark(plain, "StableDiffusionV1", "dwtDctSvd")).save(tmp_path / "watermarked.png")
    Image.fromarray(plain[:64, :64]).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    code, out, _ = call("inspect", tmp_path / "watermarked.png")
    assert code == 0
    assert out.splitlines()[0].endswith(
        "watermarked.png: found, dwtDctSvd, 136 of 136 bits (100%; chance gives fewer than 96): StableDiffusionV1"
    )
    code, out, _ = call("inspect", tmp_path / "watermarked.png", tmp_path / "plain.png", "--json")
    assert code == 1
    assert [reading["found"] for reading in json.loads(out)] == [True, False]
    read = [tmp_path / "none.png", tmp_path / "watermarked.png", tmp_path / "text.png"]
    code, out, err = call("inspect", *read)
    assert (code, out.count(".png: "), err.count("\n")) == (1, 1, 2)
    assert "watermarked.png: found" in out
    assert "none.png does not exist" in err
    assert "text.png cannot be read as a picture" in err
    code, out, _ = call("inspect", *read, "--json")
    assert [(reading["found"], "error" in reading) for reading in json.loads(out)] == [
        (False, True), (True, False), (False, True)
    ]  # fmt: skip
    os.mkfifo(tmp_path / "pipe.png")
    assert "no regular file" in call("inspect", tmp_path / "pipe.png")[2]
    code, out, _ = call("inspect", tmp_path / "small.png")
    assert (code, "small.png: 64x64 pixels, too few for a watermark" in out) == (1, True)
    for name, words in [("text", "cannot be read as a picture"), ("none", "does not exist")]:
        code, _, err = call("inspect", tmp_path / f"{name}.png")
        assert code == 2
        assert words in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("executor", "number"),
    [
        pytest.param("inline", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.cluster),
    ],
)
def test_one_signal_ends_in_order_and_the_same_command_resumes(
    call: Call, job: list[object], tmp_path: Path, executor: str, number: signal.Signals
):
    images = 16 if executor == "ray" else 4  # Ray's workers hear of the stop up to a second later
    slow = [*job, "--num-inference-steps", 60, "--num-images", images]
    process = start("run", *slow, "--executor", executor)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/ledger/*/*.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "press Ctrl-C again" in err
    assert "resume: latentmill run" in out
    assert "Traceback" not in err
    committed = len(list(tmp_path.glob("out/ledger/*/*.parquet")))
    code, out, _ = call("run", *slow, "--json")
    assert code == 0
    assert json.loads(out)["generated"] == 6 * images - 2 * committed


@pytest.mark.cluster
def test_a_run_on_ray_says_nothing_but_its_own_lines(job: list[object], tmp_path: Path):
    """The default executor, from another folder, into a relative output: workers find our modules and the place."""
    on_ray = [argument for argument in job if argument not in {"--executor", "inline"}]
    on_ray[on_ray.index(tmp_path / "out")] = "data set"
    process = start("run", *on_ray, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [line for line in err.splitlines() if not line.startswith("latentmill: ")] == []
    assert out.startswith("finished\n")
    assert "up to 2 actors" in out or "actors" in out
    assert "latentmill report 'data set'" in out or "data set" in out
    assert (tmp_path / "data set" / "_job" / "dataset.json").is_file()
