"""Jobs that run on a cluster without us: found again, followed, cancelled, resumed, and no secret told."""

from __future__ import annotations

import http.server
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from latentmill import cli
from latentmill.jobs.code import package_root
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.job_file import resolve
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.submission import submission
from latentmill.jobs.submission.api import JobInfo, JobState
from latentmill.jobs.submission.ray_jobs import JobsClient, pack_code
from latentmill.jobs.submission.submission import cancel_job, find_job, job_status, submit_job
from tests.harness.cluster import ROOT, Cluster
from tests.harness.s3 import S3_SECRET
from tests.jobs.driver import read_dataset

pytestmark = pytest.mark.slow

HEAD = "http://head:8265"
PATIENCE = 240.0
"""Seconds until a step that takes a few counts as hung; a machine that is busy otherwise may take long."""


class FakeApi:
    """A cluster that remembers what it was asked to run."""

    address = HEAD

    def __init__(self, *, guarded: bool = True) -> None:
        self.jobs: dict[str, JobInfo] = {}
        self.sent: list[dict[str, object]] = []
        self.guarded = guarded

    def require_token(self) -> None:
        if not self.guarded:
            raise UsageError("anyone can run code there")

    def submit(self, job_id: str, **sent: object) -> bool:
        if job_id in self.jobs:
            return False
        self.set(job_id, "pending")
        self.sent.append({"job_id": job_id, **sent})
        return True

    def info(self, job_id: str) -> JobInfo | None:
        return self.jobs.get(job_id)

    def stop(self, job_id: str) -> bool:
        return self.jobs[job_id].state in {"pending", "running"}  # and the driver goes on for a while

    def set(self, job_id: str, state: JobState, message: str = "", out: str | None = None) -> None:
        self.jobs[job_id] = JobInfo(job_id=job_id, address=self.address, state=state, message=message, out=out)


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What this machine's user has named so far lies in a folder of the test; nothing is named by the environment."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def spec(manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., JobSpec]:
    def build(**settings: object) -> JobSpec:
        return resolve(None, {"prompts": [str(manifest(4))], "out": str(tmp_path / "out"), "address": HEAD, **settings})

    return build


def submit(spec: JobSpec, api: FakeApi, **options: object) -> submission.Submission:
    return submit_job(spec, **{"shared_filesystem": True, "api": api, **options})


def test_the_same_job_is_found_while_it_runs_and_started_again_when_it_has_ended(spec):
    api = FakeApi()
    first = submit(spec(), api)
    assert (first.started, first.state) == (True, "pending")
    api.set(first.job_id, "running")
    again = submit(spec(), api)
    assert (again.job_id, again.started, again.state) == (first.job_id, False, "running")
    for number, ended in enumerate(("failed", "stopped", "succeeded"), start=2):
        api.set(f"{first.job_id}-{number - 1}".removesuffix("-1"), ended)
        resumed = submit(spec(), api)
        assert (resumed.job_id, resumed.started) == (f"{first.job_id}-{number}", True)
    assert len(api.sent) == 4
    assert find_job(spec().out).job_id == f"{first.job_id}-4"


def test_another_job_or_another_output_is_another_id(spec, tmp_path: Path):
    api = FakeApi()
    ids = {submit(job, api).job_id for job in (spec(), spec(seed=7), spec(out=str(tmp_path / "other")))}
    assert len(ids) == 3


def test_a_job_of_a_head_that_is_no_more_is_not_taken_for_this_one(spec):
    """The table of jobs dies with a head; the record in the output does not, and the old id is not used again."""
    first = submit(spec(), FakeApi())
    anew = submit(spec(), FakeApi())
    assert anew.job_id == f"{first.job_id}-2"


def test_whoever_loses_the_race_to_submit_finds_the_winner(spec):
    class Raced(FakeApi):
        def submit(self, job_id: str, **sent: object) -> bool:
            super().submit(job_id, **sent)
            return False  # someone else was first

    lost = submit(spec(), Raced())
    assert (lost.started, lost.state) == (False, "pending")


def test_the_driver_gets_the_same_job_with_the_manifest_where_it_can_see_it(spec, tmp_path: Path):
    api = FakeApi()
    job = spec(sweep=["guidance_scale=1,7.5"], negative_prompt="it's: [not] {yaml}", num_actors=3, strict=True)
    submit(job, api)
    words = str(api.sent[0]["entrypoint"]).split()
    assert words[:5] == ["exec", "sh", submission.START, "run", "--config"]
    sent = resolve(words[5], {})
    assert Path(sent.prompts[0]).read_bytes() == Path(job.prompts[0]).read_bytes()
    assert Path(sent.prompts[0]).is_relative_to(tmp_path / "out/_job/submitted")
    told = {"address": None}
    assert sent.runtime == replace(job.runtime, **told)
    assert replace(sent, prompts=job.prompts, runtime=job.runtime) == job


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"out .* is a path of this machine; .*s3://bucket/prefix.*--shared-filesystem"),
        (
            {"out": "s3://bucket/x", "model": str(ROOT / "engine/embedded")},
            r"model /.*/embedded is a path of this machine",
        ),
        (
            {"out": "s3://bucket/x", "model": f"sd15={ROOT}/engine/embedded"},
            r"model sd15=/.*/embedded is a path of this",
        ),
        (
            {"out": "s3://bucket/x", "model": "runs/step-9.safetensors"},
            r"model runs/step-9.safetensors is a path of this",
        ),
        ({"out": "s3://bucket/x", "vae": "vae.safetensors"}, r"vae vae.safetensors is a path of this machine; give a"),
        ({"out": "s3://bucket/x", "vae": "memory://vae.safetensors"}, r"vae memory://vae.* lives in one process only"),
        ({"out": "s3://bucket/x", "preview_decoder": "taesd"}, r"preview_decoder taesd is a path of this machine"),
        ({"out": "s3://bucket/x", "wildcards": "words"}, r"wildcards words is a path of this machine"),
        ({"out": "s3://bucket/x", "tokenizer": "/models/clip"}, r"tokenizer /models/clip is a path of this machine"),
        ({"out": "s3://bucket/x", "lora": ["ink=ink.safetensors:0.8"]}, r"lora ink ink.safetensors:0.8 is a path of"),
        ({"out": "s3://bucket/x", "reuse": "older"}, r"reuse older is a path of this machine"),
        (
            {"out": "s3://bucket/x", "sweep": ["model=sd15,/models/mine.ckpt"]},
            r"sweep model /models/mine.ckpt is a path of",
        ),
        ({"out": "memory://x"}, "lives in one process only"),
        ({"executor": "inline"}, "leave --executor out"),
        ({"address": "head:6379"}, r"'head:6379' is not the URL of a Ray dashboard; give --address http://HEAD:8265"),
        ({"address": None}, r"no cluster is named; give --address http://HEAD:8265"),
        ({"address": "http://me:secret@head:8265"}, "carries credentials"),
    ],
)
def test_what_the_nodes_could_not_see_is_refused_before_anything_is_written(spec, tmp_path, settings, words):
    with pytest.raises(UsageError, match=words) as refused:
        submit_job(spec(**settings), api=FakeApi() if "address" not in settings else None)
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "place", "words"),
    [
        (
            "image",
            "/photos/a.png",
            "'/photos/a.png' is a path of this machine; give a URL .* --shared-filesystem",
        ),
        ("mask", "a.png", "'a.png' is a path of this machine"),
        ("image", "memory://a.png", "'memory://a.png' lives in one process only"),
        ("model", "runs/step-9.safetensors", "'runs/step-9.safetensors' is a path of this machine"),
        ("model", "sd15=/models/v1-5", "'sd15=/models/v1-5' is a path of this machine"),
    ],
)
def test_a_row_that_names_a_place_of_this_machine_is_refused_before_anything_is_written(
    spec, tmp_path: Path, column: str, place: str, words: str
):
    """The first row names what nodes see; the second does not."""
    seen = {"image": "s3://bucket/a.png", "mask": "", "model": "embedded"}
    rows = [{"prompt": "a", **seen}, {"prompt": "b", **seen, column: place}, {"prompt": "c"}]
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UsageError, match=rf"rows.jsonl, row 2: {column} {words}"):
        submit(spec(prompts=[str(prompts)], out="s3://bucket/x"), FakeApi(), shared_filesystem=False)


@pytest.mark.parametrize(
    ("column", "place", "words"),
    [
        (
            "image",
            "photos/a.png",
            "begins in the manifest's folder, but the cluster .*; write its whole path",
        ),
        ("mask", "~/a.png", "begins in the manifest's folder"),
        ("model", "runs/step-9.safetensors", "begins in this folder, but the cluster"),
    ],
)
def test_a_row_with_a_relative_place_is_refused_also_where_disks_are_shared(spec, tmp_path, column, place, words):
    """The manifest moves into the output; a whole path stays what it is."""
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text(json.dumps({"prompt": "a", column: place}))
    with pytest.raises(UsageError, match=rf"rows.jsonl, row 1: {column} '{place}' {words}"):
        submit(spec(prompts=[str(prompts)]), FakeApi())
    assert not (tmp_path / "out").exists()
    prompts.write_text(json.dumps({"prompt": "a", column: f"/disk/{place}"}))
    assert submit(spec(prompts=[str(prompts)]), FakeApi()).started


def test_rows_whose_models_an_axis_overrides_and_hub_ids_are_sent(spec, tmp_path: Path):
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text(json.dumps({"prompt": "a", "model": "runs/step-9.safetensors"}))
    assert submit(spec(prompts=[str(prompts)], sweep=["model=sd15,owner/name"]), FakeApi()).started
    prompts.write_text(json.dumps({"prompt": "a", "model": "owner/name"}))
    assert submit(spec(prompts=[str(prompts)]), FakeApi()).started


def test_a_cluster_that_takes_jobs_from_anyone_gets_none_unless_the_user_insists(spec, tmp_path: Path):
    api = FakeApi(guarded=False)
    with pytest.raises(UsageError, match="anyone can run code"):
        submit(spec(), api)
    assert not (tmp_path / "out").exists()
    assert submit(spec(insecure_ray=True), api).started


def test_only_variables_that_are_named_leave_this_machine(spec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-5d1f")
    monkeypatch.setenv("HF_TOKEN", "given-away")
    api = FakeApi()
    submit(spec(), api, forwarded=["HF_TOKEN"])
    assert api.sent[0]["variables"] == {"HF_TOKEN": "given-away"}
    assert "canary-5d1f" not in repr(api.sent)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"canary-5d1f" not in written
    assert b"given-away" not in written
    with pytest.raises(UsageError, match="--env takes the name of a variable") as refused:
        submit(spec(), api, forwarded=["HF_TOKEN=given-away"])
    assert "given-away" not in str(refused.value)
    with pytest.raises(UsageError, match="NOWHERE: there is no such variable"):
        submit(spec(), api, forwarded=["NOWHERE"])


def test_an_address_out_of_an_output_is_followed_only_if_the_user_named_it(spec, at_home: Path, tmp_path: Path):
    """Whoever can write into an output could have the token sent to a server of his own."""
    submit(spec(), FakeApi())
    out = spec().out
    assert find_job(out).address == HEAD
    (at_home / "latentmill/clusters").unlink()  # as on another machine
    with pytest.raises(UsageError, match=f"from another machine.*--address {HEAD}"):
        find_job(out)
    assert find_job(out, HEAD).address == HEAD
    answer = job_status_of_planned(out, tmp_path)
    assert answer.job is not None
    assert answer.job.state == "unknown"


def job_status_of_planned(out: str, tmp_path: Path) -> submission.JobStatus:
    """The status of an output that has a plan."""
    from tests.jobs.driver import job_spec, run

    prompts = next((tmp_path / "out/_job/submitted").rglob("*.txt"))
    run(job_spec("embedded", prompts, out))
    return job_status(out)


def test_status_neither_fails_nor_waits_when_the_cluster_is_silent(spec, tmp_path: Path):
    """A head that accepts connections and says nothing is the worst kind."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = FakeApi()
        api.address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        submit(spec(), api)
        began = time.monotonic()
        answer = job_status_of_planned(spec().out, tmp_path)
        assert time.monotonic() - began < 15
    assert answer.report is not None
    assert (answer.report.state, answer.job and answer.job.state) == ("published", "unknown")
    assert answer.to_dict()["state"] == "published"


def test_records_that_are_none_of_ours_are_passed_over(spec):
    submit(spec(), FakeApi())
    storage = Storage.open(spec().out)
    storage.write("_job/submissions/latentmill-0000000000000000.json", b'{"address": ')
    storage.write("_job/submissions/latentmill-0000000000000001.json", b"[1]")
    storage.write("_job/submissions/../x.json".replace("../", ""), b'{"address": "http://evil", "submitted": "9"}')
    assert find_job(spec().out).address == HEAD


def test_a_redirect_does_not_take_the_token_along(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            guarded = self.headers.get("Authorization") is None
            self.send_response(401 if guarded else 302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(JobError, match="answered 302"):
            JobsClient(f"http://127.0.0.1:{server.server_port}").info("latentmill-0000000000000000")
        server.shutdown()
    assert [path for path, _ in seen] == ["/api/version", "/api/jobs/latentmill-0000000000000000"]
    assert [bool(token) for _, token in seen] == [False, True]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """A cluster that every call finds at its address."""
    api = FakeApi()
    monkeypatch.setattr(submission, "_api", lambda *_, **__: api)
    return api


@pytest.mark.parametrize("by_id", [True, False])
def test_a_cancelled_job_is_stopping_until_its_driver_has_ended(spec, api: FakeApi, by_id: bool):
    out = spec().out
    job_id = submit(spec(), api).job_id
    api.set(job_id, "running", out=out)
    target = job_id if by_id else out
    address = HEAD if by_id else None
    assert cancel_job(target, address=address).state == "stopping"
    for asked in (job_id, out):
        told = job_status(asked, address=HEAD).job
        assert told is not None
        assert (told.state, told.cli_exit_code) == ("stopping", 0)
    again = submit(spec(), api)
    assert (again.job_id, again.started, again.state) == (job_id, False, "stopping")
    api.set(job_id, "stopped", out=out)
    assert find_job(out).job_id == job_id
    assert cancel_job(target, address=address).state == "stopped"
    resumed = submit(spec(), api)
    api.set(resumed.job_id, "running", out=out)
    told = job_status(out).job
    assert told is not None
    assert (told.job_id, told.state) == (f"{job_id}-2", "running")


def test_a_job_that_failed_makes_status_fail_and_shows_its_words_as_lines(spec, api: FakeApi, capsys, monkeypatch):
    job_id = submit(spec(), api).job_id
    message = "Job entrypoint command failed with exit code 2, last available logs:\nerror: no \x1b[31msuch file\r\nend"
    api.set(job_id, "failed", message=message)
    monkeypatch.setattr(sys, "argv", ["latentmill", "status", spec().out])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == [
        "Job entrypoint command failed with exit code 2, last available logs:",
        "error: no \\x1b[31msuch file",
        "end",
    ]


def test_the_driver_is_started_by_the_python_of_ray_whatever_path_says(tmp_path: Path):
    """The script that starts it, below a process whose command line is a raylet's."""
    script = str(package_root() / "jobs/submission/start.sh")
    python = tmp_path / "a venv" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"')
    python.chmod(0o755)
    supervisor = f"import subprocess; subprocess.run(['sh', {script!r}, 'run', 'a b'], check=True)"
    for place in (python, Path("/bin/echo")):
        worker = subprocess.list2cmdline([str(place), "/x/setup_worker.py", "--session=a b"])
        raylet = [sys.executable, "-c", supervisor, f"--python_worker_command={worker}", "--java_worker_command="]
        told = subprocess.run(raylet, capture_output=True, text=True, check=True)
        assert told.stdout == "-m latentmill run a b\n"
    lost = subprocess.run(["sh", script, "run"], capture_output=True, text=True, check=False)
    assert lost.returncode == 1
    assert re.fullmatch(r"error: no raylet on \S+ says by which Python Ray runs here; .*\n", lost.stderr)


@contextmanager
def jobs_api(token: str | None, seen: list[str]) -> Iterator[str]:
    """The URL of a stub of the jobs API that wants this token, or serves anyone; `seen` are the tokens it was shown."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = self.headers.get("Authorization") or ""
            seen.append(shown)
            self.send_response(200 if token is None or shown == f"Bearer {token}" else 401)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    """The token that this process has for clusters."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    return "mine"


def test_a_jobs_api_that_serves_a_stranger_is_refused_and_shown_no_token(mine: str):
    seen: list[str] = []
    with jobs_api(None, seen) as url, pytest.raises(UsageError, match=r"for anyone who can reach it.*--insecure-ray"):
        JobsClient(url).require_token()
    assert seen == [""]


def test_a_jobs_api_that_does_not_take_the_token_here_is_told(mine: str):
    seen: list[str] = []
    with jobs_api("theirs", seen) as url, pytest.raises(UsageError, match=r"asks for a token, and does not take"):
        JobsClient(url).require_token()
    assert seen == ["", "Bearer mine"]


def test_a_jobs_api_that_takes_the_token_here_lets_in(mine: str):
    seen: list[str] = []
    with jobs_api(mine, seen) as url:
        JobsClient(url).require_token()
    assert seen == ["", "Bearer mine"]


@pytest.mark.slow
def test_the_code_that_is_sent_is_all_that_a_job_needs_and_nothing_else(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    packed = pack_code(tmp_path / "a")
    assert packed.read_bytes() == pack_code(tmp_path / "b").read_bytes()
    assert packed.stat().st_size < 60_000_000  # Ray keeps it in the head's memory, and refuses 500 MB
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "code")
    assert not [name for name in names if name.startswith(("tests", "training", "bench", ".")) or "__pycache__" in name]
    environment = {**os.environ, "PYTHONPATH": ""}
    asked = "import latentmill.jobs.runner as jobs; print(jobs.__file__); from importlib import metadata as m; "
    asked += "print(m.distribution('latentmill').locate_file(''))"
    told = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=tmp_path / "code",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(line).is_relative_to(tmp_path / "code") or line == "." for line in told.stdout.split())
    shown = subprocess.run(
        [sys.executable, "-m", "latentmill", "plan", str(ROOT / "configs/prompts/sample.txt"), "--json"],
        cwd=tmp_path / "code",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shown.stdout)["samples"] > 0


@contextmanager
def latentmill(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the context."""
    command = [sys.executable, "-m", "latentmill", *map(str, arguments)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(*arguments: object) -> dict[str, object]:
    with latentmill(*arguments, "--json") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.timeout(600)
def test_from_submit_to_the_published_dataset_with_a_cancel_between(guarded, s3, manifest, monkeypatch, tmp_path):
    """The embedded model on a cluster of its own and an S3 server; the driver runs there, from the code sent along."""
    for name, value in guarded.client_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ADDRESS", "http://nowhere.invalid:1")  # what is said on the command line counts
    small = ["--num-inference-steps", 15, "--chunk-size", 2, "--batch-size", 2, "--safety", "none"]
    job = ["submit", manifest(60), "--out", s3, "--address", guarded.dashboard, *small]
    first = answer(*job)
    assert first["started"]
    with latentmill("logs", first["job_id"], "--follow", "--address", guarded.dashboard) as follower:
        assert answer(*job) | {"started": True, "state": ""} == first | {"state": ""}
        storage = Storage.open(s3)
        wait_until(lambda: len(list(storage.list("ledger"))) >= 2)
        running = job_status(s3).to_dict()
        assert (running["state"], running["job"]["state"]) == ("started", "running")
        cancel_job(s3)  # at once: the command takes seconds to start, in which a fast machine is done
        said, err = follower.communicate(timeout=PATIENCE)
        assert (follower.returncode, err) == (130, "")
    assert "latentmill: generating" in said
    assert "\ninterrupted\n" in said  # the driver ended by itself, in order
    assert answer("cancel", s3)["state"] == "stopped"
    stopped = answer("status", s3)
    assert stopped["job"]["state"] == "stopped"
    left = stopped["chunks"] - stopped["chunks_committed"]
    assert left > 0
    second = answer(*job)
    assert second["job_id"] == f"{first['job_id']}-2"
    with latentmill("logs", s3, "--follow") as follower:
        said, err = follower.communicate(timeout=PATIENCE)
        assert (follower.returncode, err) == (0, "")
    assert f"this run: {2 * left} images" in said
    assert answer("status", s3)["job"]["state"] == "succeeded"
    assert read_dataset(s3).manifest["counts"]["ok"] == 60
    tells_no_secret(guarded, s3, tmp_path)


def tells_no_secret(head: Cluster, out: str, tmp_path: Path) -> None:
    """Neither what the jobs API shows nor the session's logs and the output hold the store's key or the token."""
    client = JobsClient(head.dashboard)
    shown = json.dumps(client._status("GET", "/api/jobs/", client._headers)[1].decode())
    assert "latentmill-" in shown
    logs = b"".join(path.read_bytes() for path in (head.folder / "r").rglob("logs/**/*") if path.is_file())
    assert b"Running entrypoint" in logs
    storage = Storage.open(out)
    written = b"".join(storage.read(path) for path, _ in storage.list("_job"))
    for secret in (S3_SECRET, head.token_file.read_text()):
        assert secret not in shown
        assert secret.encode() not in logs
        assert secret.encode() not in written
    assert stat.S_IMODE(head.token_file.stat().st_mode) == 0o600


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)
