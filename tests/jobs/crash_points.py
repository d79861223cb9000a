"""Every place where a process of a job can die, and what the same command makes of it afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from jobs.outputs.ledger import chunk_of_path
from jobs.outputs.verify import verify
from jobs.spec import JobSpec
from jobs.store.storage import Storage
from jobs.worker import load_engine
from tests.jobs.driver import Dataset, job_spec, read_dataset, run, start
from tests.jobs.killing_proxy import AtRequest, killing_proxy
from tests.jobs.traps import AtBatch, AtLoading, AtStep, AtSync, KillAt, Rig, Trap

PROMPTS = [f"a red circle, number {number}" for number in range(7)] + ["some poison", "some nsfw"]
SETTINGS = {"num_images": 2, "chunk_size": 4}
SAMPLES, CHUNKS = 18, 5
REAL_SETTINGS = {"chunk_size": 2, "num_inference_steps": 4, "width": 256, "height": 256, "safety": "none"}
REAL_SETTINGS |= {"watermark": "dwtDct"}
SECONDS = 120

Victim = Literal["driver", "actor", "finisher"]


@dataclass(frozen=True)
class CrashPoint:
    """Where whom death meets: in this process's own job (`inline`) or on a Ray cluster, on a disk or on S3."""

    phase: str
    moment: str
    trap: Trap | AtRequest
    victim: Victim = "driver"
    executor: Literal["inline", "ray"] = "inline"
    real: bool = False

    @property
    def name(self) -> str:
        return f"{self.phase}: {self.moment} ({self.victim}, {self.executor})"

    @property
    def store(self) -> str:
        return "S3" if isinstance(self.trap, AtRequest) else "disk"


LEDGER, IMAGES, PART, MANIFEST = "ledger/", "images/", "dataset/part", "dataset/manifest"

INLINE = (
    CrashPoint("plan", "before any snapshot", KillAt("before", "create", "_job/manifest")),
    CrashPoint("plan", "before plan.json", KillAt("before", "create", "_job/plan.json")),
    CrashPoint("plan", "after plan.json", KillAt("after", "create", "_job/plan.json")),
    CrashPoint("model load", "one of three networks loaded", AtLoading(1), real=True),
    CrashPoint("mid-batch", "between two denoising steps of the second chunk", AtStep(7), real=True),
    CrashPoint("mid-upload", "before the first image", KillAt("before", "write", IMAGES)),
    CrashPoint("mid-upload", "between two images of a chunk", KillAt("after", "write", IMAGES, 6)),
    CrashPoint("mid-upload", "an image written, still under its temporary name", AtSync("/images/", 7)),
    CrashPoint("before commit", "the chunk's images stand", KillAt("before", "create", LEDGER, 2)),
    CrashPoint("before commit", "the record written, still under its temporary name", AtSync("/ledger/", 3)),
    CrashPoint("after commit", "the record stands", KillAt("after", "create", LEDGER, 3)),
    CrashPoint("after commit", "the last record stands", KillAt("after", "create", LEDGER, CHUNKS)),
    CrashPoint("publish", "before a part", KillAt("before", "write", PART)),
    CrashPoint("publish", "after a part", KillAt("after", "write", PART)),
    CrashPoint("publish", "before the manifest", KillAt("before", "write", MANIFEST)),
    CrashPoint("publish", "after the manifest", KillAt("after", "write", MANIFEST)),
)

S3 = (
    CrashPoint("mid-upload", "half of an image's bytes sent", AtRequest("half", "/images/", 6)),
    CrashPoint("before commit", "half of a record's bytes sent", AtRequest("half", "/ledger/", 2)),
    CrashPoint("commit sent", "the record stands, its answer is held", AtRequest("unanswered", "/ledger/", 3)),
    CrashPoint("publish", "the manifest stands, its answer is held", AtRequest("unanswered", "/dataset/manifest")),
)


@dataclass(frozen=True)
class Outcome:
    """What was found after the kill, and after the resume."""

    killed: int
    committed: int
    resumed_exit: int
    images_made: int
    equal: bool
    defects: tuple[object, ...]
    log: str


@dataclass(frozen=True)
class Stage:
    """Where crash points are played: a folder, a model, an S3 server's variables, and the undisturbed runs."""

    folder: Path
    model: Path
    s3: Mapping[str, str]

    @cached_property
    def prompts(self) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
        return path

    @cached_property
    def three_prompts(self) -> Path:
        path = self.folder / "three.txt"
        path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:4]))
        return path

    def spec(self, point: CrashPoint, out: str) -> JobSpec:
        if point.real:
            return job_spec(self.model, self.three_prompts, out, **REAL_SETTINGS)
        return job_spec(self.model, self.prompts, out, **SETTINGS)

    @cached_property
    def undisturbed(self) -> Mapping[bool, Dataset]:
        """By whether a real model drew it."""
        outs = {real: str(self.folder / f"undisturbed-{real}") for real in (False, True)}
        point = CrashPoint("", "", AtLoading())
        assert run(self.spec(point, outs[False])).exit_code == 1
        point = CrashPoint("", "", AtLoading(), real=True)
        assert run(self.spec(point, outs[True]), engine_factory=load_engine).exit_code == 0
        return {real: read_dataset(out) for real, out in outs.items()}


def play(point: CrashPoint, stage: Stage) -> Outcome:
    """Run the job into the trap, then once more without one; both in processes of their own."""
    folder = stage.folder / secrets.token_hex(6)
    folder.mkdir()
    on_s3 = isinstance(point.trap, AtRequest)
    out = f"s3://test/{folder.name}" if on_s3 else str(folder / "out")
    log = folder / "log"
    spec = stage.spec(point, out)
    killed = _run_into_trap(point, stage, spec, folder)
    committed = sum(chunk_of_path(path) is not None for path, _ in Storage.open(out).list("ledger"))
    resume = start(spec, log, engine=Rig(str(folder), real=point.real), environment=stage.s3)
    resume.join(SECONDS)
    dataset = read_dataset(out) if resume.exitcode in {0, 1} else None
    rig = Rig(str(folder))
    return Outcome(
        killed=killed,
        committed=committed,
        resumed_exit=-1 if resume.exitcode is None else resume.exitcode,
        images_made=sum(map(int, rig.tally.read_text().split())),
        equal=dataset == stage.undisturbed[point.real],
        defects=() if dataset is None else verify(out).defects,
        log=log.read_text(),
    )


def _run_into_trap(point: CrashPoint, stage: Stage, spec: JobSpec, folder: Path) -> int:
    """The number of the process that died."""
    environment = dict(stage.s3)
    with ExitStack() as stack:
        if isinstance(point.trap, AtRequest):
            proxy = stack.enter_context(killing_proxy(stage.s3["AWS_ENDPOINT_URL"], point.trap))
            environment["AWS_ENDPOINT_URL"] = proxy.url
            rig = Rig(str(folder), real=point.real)
        else:
            proxy = None
            where = "generator" if isinstance(point.trap, AtLoading | AtStep | AtBatch) else "driver"
            rig = Rig(str(folder), trap=point.trap, where=where, real=point.real)
        driver = start(spec, folder / "log", engine=rig, environment=environment)
        if proxy is not None:
            proxy.victim = driver.pid
        driver.join(SECONDS)
    return driver.pid if driver.exitcode == -9 else 0
