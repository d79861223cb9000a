"""Every threat that the project names, and the test that holds it off. Those of one room stand in that room:

Pickle: tests/engine/test_checkpoint_safety.py::test_code_in_a_checkpoint_does_not_run
Pickle: tests/engine/test_checkpoint_safety.py::test_code_in_a_checkpoint_of_old_torch_does_not_run
Pickle: tests/security/test_threats.py::test_a_job_on_a_hostile_checkpoint_runs_nothing_of_it
Pickle: tests/security/test_threats.py::test_pickled_weights_in_a_folder_are_not_opened
Ray: tests/jobs/executors/test_cluster.py::test_a_cluster_that_serves_anyone_is_refused_unless_the_user_insists
Ray: tests/jobs/executors/test_cluster.py::test_nobody_submits_code_without_the_token
Ray: tests/jobs/executors/test_cluster.py::test_a_cluster_of_our_own_asks_for_a_token_that_nobody_else_can_read
Secrets: tests/security/test_threats.py::test_no_secret_is_in_any_file_log_or_line_of_a_run_on_ray
Secrets: tests/security/test_threats.py::test_no_secret_is_in_the_words_of_a_run_that_fails
Secrets: tests/jobs/store/test_urls.py::test_a_shown_url_has_no_user_no_password_no_query
Secrets: tests/jobs/store/test_storage.py::test_wrong_credentials_are_one_line_without_the_secret
Path traversal: tests/security/test_threats.py::test_ids_are_data_and_never_names
Path traversal: tests/security/test_hostile_outputs.py::test_run_deletes_nothing_that_a_forged_dataset_manifest_names
Path traversal: tests/security/test_hostile_outputs.py::test_clean_follows_no_symbolic_link
Path traversal: tests/security/test_hostile_outputs.py::test_report_writes_and_deletes_nothing_through_a_symbolic_link
Path traversal: tests/security/test_hostile_outputs.py::test_forged_names_of_pictures_open_nothing
Path traversal: tests/jobs/store/test_local.py::test_no_call_follows_a_symbolic_link_below_the_root
Path traversal: tests/jobs/store/test_local.py::test_no_call_takes_a_name_that_leads_out_of_the_root
Path traversal: tests/jobs/store/test_urls.py::test_other_places_are_refused_in_one_line_without_secrets
Bombs: tests/jobs/manifests/test_manifest.py::test_a_tiny_parquet_file_that_decodes_to_a_gigabyte_is_read_in_little_memory
Bombs: tests/jobs/manifests/test_manifest.py::test_a_parquet_page_that_expands_beyond_reason_is_refused
Bombs: tests/security/test_hostile_outputs.py::test_a_record_that_unfolds_to_gigabytes_is_damaged
Bombs: tests/security/test_hostile_outputs.py::test_a_part_that_unfolds_to_gigabytes_is_damaged
Bombs: tests/security/test_hostile_outputs.py::test_a_picture_that_unfolds_to_gigabytes_is_told_by_its_header
Bombs: tests/security/test_hostile_outputs.py::test_the_mark_of_a_picture_that_unfolds_to_gigabytes_is_not_read
PNG text: tests/jobs/test_worker.py::test_parameters_text_is_read_back_whole_by_pillow
PNG text: tests/security/test_threats.py::test_the_longest_prompt_is_cut_in_the_picture_and_whole_in_its_row
Control characters: tests/security/test_threats.py::test_no_verb_lets_anything_through_that_a_terminal_obeys
Control characters: tests/jobs/show/test_display.py::test_tables_and_facts_show_untrusted_cells_literally
Control characters: tests/jobs/manifests/test_validate.py::test_a_bad_prompt_is_rejected_with_its_reason
Control characters: tests/jobs/store/test_faults.py::test_a_damaged_answer_does_not_reach_the_terminal
SSRF: tests/security/test_threats.py::test_rows_fetch_nothing
SSRF: tests/jobs/store/test_urls.py::test_other_places_are_refused_in_one_line_without_secrets
Safety: tests/engine/test_pipeline.py::test_safety_fails_closed
Safety: tests/engine/test_safety_clip.py::test_nan_is_flagged_where_the_published_class_would_pass_it
Safety: tests/engine/test_safety_clip.py::test_a_checker_that_does_not_load_is_an_error
Safety: tests/engine/test_watermark_and_safety.py::test_a_score_that_is_not_a_number_is_flagged
Safety: tests/jobs/test_worker.py::test_no_verdict_is_never_ok
Safety: tests/security/test_threats.py::test_safety_that_was_switched_off_is_written_in_plan_and_rows
Watermark: tests/security/test_threats.py::test_a_picture_too_small_for_the_mark_is_refused_before_anything_is_written
Watermark: tests/engine/test_watermark_and_safety.py::test_too_small_a_picture_is_refused_not_skipped
"""  # noqa: E501 - a test has its name on one line

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import pty
import re
import secrets
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill import cli
from latentmill.engine import EngineError
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.parameters import TEXT_LIMIT
from latentmill.jobs.plans.plan import draft_plan
from latentmill.jobs.store.storage import Storage
from tests.engine.test_checkpoint_safety import WEIGHTS, canaries
from tests.harness.s3 import S3_SECRET
from tests.jobs.driver import job_spec, read_dataset, run

pytestmark = pytest.mark.slow

Manifest = Callable[..., Path]
ROOT = Path(__file__).parents[2]
THREATS = ["Pickle", "Ray", "Secrets", "Path traversal", "Bombs", "PNG text", "Control characters"]
THREATS += ["SSRF", "Safety", "Watermark"]
SMALL = ["--width", "64", "--height", "64", "--num-inference-steps", "2", "--chunk-size", "2", "--batch-size", "2"]
SMALL += ["--watermark", "none", "--safety", "none"]


def test_every_threat_has_tests_and_they_exist() -> None:
    lines = re.findall(r"^([A-Z][\w ]+): (tests/\S+)::(\w+)$", __doc__ or "", re.MULTILINE)
    assert len(lines) == (__doc__ or "").count("::")
    assert list(dict.fromkeys(threat for threat, _, _ in lines)) == THREATS
    for _, path, name in lines:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path} lacks {name}"


def command(
    *arguments: object, wrapper: str = "from latentmill import cli; cli.main()", **environment: str
) -> tuple[int, bytes, bytes]:
    """The command in a process of its own, with its answers."""
    done = subprocess.run(
        [sys.executable, "-c", wrapper, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


# Pickle


@pytest.mark.parametrize("name", ["system", "mkdir", "exec"])
def test_a_job_on_a_hostile_checkpoint_runs_nothing_of_it(
    name: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, checkpoint = tmp_path / "canary", tmp_path / "model.ckpt"
    torch.save({"state_dict": {**WEIGHTS, "evil": canaries(mark)[name]}}, checkpoint)
    with pytest.raises((UsageError, EngineError)):
        run(job_spec(checkpoint, manifest(2), tmp_path / "out"))
    assert not mark.exists()
    torch.load(checkpoint, weights_only=False)
    assert mark.exists(), "the canary is dead, and the test says nothing"


def test_pickled_weights_in_a_folder_are_not_opened(
    manifest: Manifest, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, mark = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny_model, folder)
    for weights in folder.rglob("*.safetensors"):
        torch.save({**WEIGHTS, "evil": canaries(mark)["mkdir"]}, weights.with_suffix(".bin"))
        weights.unlink()
    with pytest.raises((UsageError, EngineError), match="safetensors"):
        run(job_spec(folder, manifest(2), tmp_path / "out"))
    assert not mark.exists()


# Secrets


def everything_under(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path, path.read_bytes()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Short enough for Ray's sockets."""
    folder = Path("/tmp", f"s{secrets.token_hex(3)}")
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.cluster
def test_no_secret_is_in_any_file_log_or_line_of_a_run_on_ray(
    s3: str, manifest: Manifest, tiny_model: Path, scratch: Path
) -> None:
    keep = "import types; from latentmill import cli; from latentmill.jobs import scratch; "  # the cluster's logs stay
    keep += "scratch.shutil = types.SimpleNamespace(rmtree=lambda *_, **__: None); cli.main()"
    arguments = ["run", manifest(4), "--out", s3, "--model", tiny_model, *SMALL, "--num-actors", 1]
    code, out, err = command(*arguments, wrapper=keep, TMPDIR=str(scratch))
    assert code == 0, err
    storage = Storage.open(s3)
    written = {path: storage.read(path) for path, _ in [*storage.list(""), *storage.list_hidden("")]}
    assert {"_job/plan.json", "_job/dataset.json"} < written.keys()
    logs = dict(everything_under(scratch))
    assert any("worker" in path.name for path in logs), "Ray's logs are not there to be searched"
    canary = S3_SECRET.encode()
    assert [place for place, data in {**written, **logs, "stdout": out, "stderr": err}.items() if canary in data] == []


@pytest.mark.parametrize(
    "failure",
    ["wrong key", "password in --out", "password in the manifest's place", "password in the endpoint", "a bug of ours"],
)
def test_no_secret_is_in_the_words_of_a_run_that_fails(
    failure: str, s3: str, manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    out, prompts, wrapper, environment = s3, str(manifest(2)), "from latentmill import cli; cli.main()", {}
    canary = S3_SECRET
    if failure == "wrong key":
        environment = {"AWS_SECRET_ACCESS_KEY": f"wrong-{canary}"}
    elif failure == "password in --out":
        out = f"s3://key:{canary}@test/out?X-Amz-Signature={canary}"
    elif failure == "password in the manifest's place":
        prompts = f"s3://key:{canary}@test/prompts.csv?token={canary}"
    elif failure == "password in the endpoint":
        environment = {"AWS_ENDPOINT_URL": f"http://user:{canary}@127.0.0.1:9/?token={canary}"}
        wrapper = "from latentmill.jobs.store import storage; storage.PATIENCE_SECONDS = 1; " + wrapper
    else:
        wrapper = "from latentmill import cli; from latentmill.jobs import runner; runner.publish = None; cli.main()"
    arguments = ["run", prompts, "--out", out, "--model", tiny_model, *SMALL, "--executor", "inline"]
    code, stdout, stderr = command(*arguments, wrapper=wrapper, **environment)
    assert code == (1 if failure == "a bug of ours" else 2), stderr
    assert (b"Traceback" in stderr) is (failure == "a bug of ours")
    assert canary.encode() not in stdout + stderr


# Path traversal

IDS = ["../x", "/etc/x", "s3://b/k", "a::b", "CON", "..", "", "x" * 10_000, "a/../../b", "%2e%2e%2f"]


def test_ids_are_data_and_never_names(tiny_model: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "in" / "prompts.csv"
    manifest.parent.mkdir()
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "prompt", "path"], *([name, f"p {n}", name] for n, name in enumerate(IDS))])
    out = tmp_path / "in" / "out"
    before = set(tmp_path.rglob("*"))
    assert run(job_spec(tiny_model, manifest, out)).exit_code == 0
    made = set(tmp_path.rglob("*")) - before - {out}
    assert all(path.is_relative_to(out) for path in made), "something was written outside the output"
    names = {path.relative_to(out).as_posix() for path in made if path.is_file()}
    shape = r"(README\.md|_job/(plan\.json|dataset\.json|manifest-[0-9a-f]+-\d+\.parquet|rejected\.parquet)"
    shape += r"|ledger/\d+/\d+\.parquet|images/\d+/(\d+-[0-9a-f]+/\d+\.png|metadata\.parquet)"
    shape += r"|dataset/part-\d+-[0-9a-f]+\.parquet)"
    assert [name for name in names if not re.fullmatch(shape, name)] == []
    rows = read_dataset(str(out)).rows
    assert rows.column("path").to_pylist() == IDS
    assert [row for row, name in zip(rows.column("row_id").to_pylist(), IDS, strict=True) if name and row != name] == []


# PNG text


def test_the_longest_prompt_is_cut_in_the_picture_and_whole_in_its_row(tiny_model: Path, tmp_path: Path) -> None:
    prompt, negative = "☃" * 5_000, "n" * 16_000
    manifest = tmp_path / "prompts.jsonl"
    manifest.write_text(json.dumps({"prompt": prompt, "negative_prompt": negative}) + "\n")
    run(job_spec(tiny_model, manifest, tmp_path / "out"))
    (row,) = read_dataset(str(tmp_path / "out")).rows.to_pylist()
    assert (row["prompt"], row["negative_prompt"]) == (prompt, negative)
    (picture,) = (tmp_path / "out" / "images").rglob("*.png")
    with Image.open(picture) as image:
        assert 0 < len(image.text["parameters"].encode()) <= TEXT_LIMIT


# Control characters

HOSTILE = [
    "\x1b[2Jcleared",
    "\x1b]52;c;ZXZpbA==\x07clipboard",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "[link=http://evil]markup[/link] [red]",
    "\u202egnp.exe\u2069 bidi",
    "\x9b2J C1",
    "bell\x07 poison",
    "zero\u200bwidth",
]
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


@pytest.fixture
def hostile_manifest(tmp_path: Path) -> Path:
    """Rows whose texts would steer a terminal, a few of which are rejected; the file's name would, too."""
    path = tmp_path / "evil\x1b[2J\u202e.jsonl"
    rows = [{"id": text, "prompt": text, "note": text} for text in HOSTILE]
    rows += [{"id": text, "prompt": text, "width": text} for text in HOSTILE]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_verb_lets_anything_through_that_a_terminal_obeys(
    hostile_manifest: Path,
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out\x1b[2J"
    job = [hostile_manifest, "--out", out, "--model", tiny_model, *SMALL, "--executor", "inline"]
    shown = {}
    monkeypatch.setenv("COLUMNS", "300")
    for verb in ("plan", "run", "status", "verify", "report", "clean"):
        for flags in ([], ["--json"]):
            arguments = [verb, *(job if verb in {"plan", "run"} else [out]), *flags]
            monkeypatch.setattr(sys, "argv", ["latentmill", *map(str, arguments)])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert not stopped.value.code, (verb, capfd.readouterr().err)
            captured = capfd.readouterr()
            shown[verb, *flags] = captured.out + captured.err
    assert {call: OBEYED.findall(text) for call, text in shown.items() if OBEYED.search(text)} == {}
    assert "\\x1b[2J" in shown["plan",]
    assert "markup[/link]" in shown["plan",], "rejected rows are shown as they are, markup and all"


def test_errors_let_nothing_through_that_a_terminal_obeys(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in HOSTILE:
        for arguments in (
            ["run", tmp_path / text.replace("/", ""), "--out", tmp_path / "out"],
            ["status", tmp_path / text.replace("/", "")],
            ["run", "x.txt", "--sampler", text],
            ["run", "x.txt", "--sweep", f"{text}=1"],
            ["run", "x.txt", "--model", text],
            ["run", "x.txt", "--out", f"{text}://x"],
        ):
            monkeypatch.setattr(sys, "argv", ["latentmill", *map(str, arguments)])
            with pytest.raises(SystemExit):
                cli.main()
            captured = capfd.readouterr()
            assert not OBEYED.search(captured.out + captured.err), arguments


@pytest.mark.slow
def test_nothing_gets_through_on_a_real_terminal_either(
    hostile_manifest: Path, tiny_model: Path, tmp_path: Path
) -> None:
    seen = io.BytesIO()
    master, slave = pty.openpty()
    arguments = ["plan", str(hostile_manifest), "--out", str(tmp_path / "out"), "--model", str(tiny_model), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-c", "from latentmill import cli; cli.main()", *arguments],
        cwd=ROOT, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(slave)
    try:
        while data := os.read(master, 65536):
            seen.write(data)
    except OSError:  # the terminal is closed: its end
        pass
    os.close(master)
    assert process.wait(60) == 0
    text = seen.getvalue().decode()
    assert "\x1b[" in text, "this was no terminal"
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text, "clipboard, title or link sequences got through"
    assert not re.search("[\x07\x80-\x9f\u202e\u2069\u200b]", text)


# SSRF

GUARD = """
import ipaddress, sys
def guard(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) or event == "socket.getaddrinfo":
        host = arguments[1][0] if event == "socket.connect" else arguments[0]
        print("CONTACT", event, host, file=sys.stderr)
    if event.startswith("urllib"):
        print("CONTACT", event, arguments[0], file=sys.stderr)
sys.addaudithook(guard)
from latentmill import cli
cli.main()
"""


@pytest.mark.slow
def test_rows_fetch_nothing(tiny_model: Path, tmp_path: Path) -> None:
    contacts: list[bytes] = []

    class Listener(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            contacts.append(self.request.recv(100))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        places = [f"{here}/a.png", f"s3://bucket/k?endpoint_url={here}", "http://169.254.169.254/latest/meta-data/"]
        places += ["file:///etc/passwd", f"simplecache::{here}/x", "//evil.example/x"]
        rows = [{"prompt": place, "id": place, "url": place, "picture": place, "image_url": place} for place in places]
        manifest = tmp_path / "prompts.parquet"
        pq.write_table(pa.Table.from_pylist(rows), manifest)
        try:
            job = ["run", manifest, "--out", tmp_path / "out", "--model", tiny_model, *SMALL, "--executor", "inline"]
            environment = dict.fromkeys(("AWS_ENDPOINT_URL", "RAY_ADDRESS"), "")
            code, _, err = command(*job, wrapper=GUARD, **environment)
        finally:
            server.shutdown()
            thread.join()
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith(b"CONTACT")] == []
    assert contacts == []
    rows = read_dataset(str(tmp_path / "out")).rows
    assert rows.column("prompt").to_pylist() == places
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert len(digests) == len(places)


# Safety


def test_safety_that_was_switched_off_is_written_in_plan_and_rows(
    manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    run(job_spec(tiny_model, manifest(2), tmp_path / "out", safety="none"))
    assert json.loads((tmp_path / "out/_job/plan.json").read_text())["identity"]["safety"] == "none"
    assert set(read_dataset(str(tmp_path / "out")).rows.column("nsfw_checker").to_pylist()) == {"none"}


# Watermark


def test_a_picture_too_small_for_the_mark_is_refused_before_anything_is_written(
    manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    spec = job_spec(tiny_model, manifest(2), tmp_path / "out", watermark="dwtDct")
    with pytest.raises(UsageError, match=r"64.*watermark"), draft_plan(spec):
        pass
    with pytest.raises(UsageError):
        run(spec)
    assert not (tmp_path / "out").exists()
