"""Every place where a process of a job can die, and what the same command makes of it afterwards."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from latentmill.jobs.ledger.ledger import chunk_of_path
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.harness.cluster import Cluster
from tests.harness.faults import AtRequest
from tests.harness.proxy import fault_proxy
from tests.jobs.driver import Dataset, job_spec, read_dataset, run, start
from tests.jobs.traps import AtBatch, AtLoading, AtStep, AtSync, KillAt, Rig, Trap

PROMPTS = [f"a red circle, number {number}" for number in range(7)] + ["some poison", "some nsfw"]
SETTINGS = {"num_images": 2, "chunk_size": 4, "threads_per_actor": 1}
CHUNKS, REAL_CHUNKS = 5, 2
REAL_SETTINGS = {"chunk_size": 2, "num_inference_steps": 4, "width": 256, "height": 256, "safety": "none"}
REAL_SETTINGS |= {"watermark": "dwtDct", "threads_per_actor": 1}
SECONDS = 400
AT_ONCE = 3
CLUSTER_CPUS = 8  # so many in name, that several small jobs run on it at once

Victim = Literal["driver", "actor"]


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


LEDGER, IMAGES, PART, MANIFEST = "ledger/", "images/", "dataset/part", "_job/dataset.json"

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
    CrashPoint("publish", "the manifest stands, its answer is held", AtRequest("unanswered", "/_job/dataset.json")),
)


RAY = (
    CrashPoint("model load", "the actor's first", AtLoading(), "actor", "ray"),
    CrashPoint("mid-batch", "between two denoising steps of the second chunk", AtStep(7), "actor", "ray", real=True),
    CrashPoint("mid-batch", "chunks in every stage", AtBatch(3), "driver", "ray"),
    CrashPoint("mid-upload", "between two images of a chunk", KillAt("after", "write", IMAGES, 2), "actor", "ray"),
    CrashPoint("before commit", "the chunk's images stand", KillAt("before", "create", LEDGER), "actor", "ray"),
    CrashPoint("after commit", "the record stands", KillAt("after", "create", LEDGER), "actor", "ray"),
)
"""A process of the cluster dies, once, and the run goes on by itself; or its driver dies, and another one joins."""


@dataclass(frozen=True)
class Outcome:
    """What was found after the kill, and after the resume."""

    killed: int
    committed: int
    chunks: int
    exits: tuple[int | None, int | None]
    expected_exit: int
    images_made: int
    samples: int
    chunk_size: int
    equal: bool
    defects: tuple[object, ...]
    log: str

    @property
    def made_again(self) -> int:
        """Images that were made more than once, because they were not committed."""
        return self.images_made - self.samples

    @property
    def sound(self) -> bool:
        """Whether somebody died, the resume ended as it must, and the dataset is the undisturbed one."""
        ended = self.exits[1] == self.expected_exit and self.exits[0] in {-signal.SIGKILL, self.expected_exit}
        return bool(self.killed) and ended and self.equal and not self.defects


@dataclass(frozen=True)
class Stage:
    """Where crash points are played: a folder, a model, an S3 server's variables, a Ray cluster, undisturbed runs."""

    folder: Path
    model: Path
    s3: Mapping[str, str]
    cluster: Cluster

    @cached_property
    def prompts(self) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
        return path

    @cached_property
    def few_prompts(self) -> Path:
        path = self.folder / "few.txt"
        path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:4]))
        return path

    def spec(self, out: str, *, real: bool, executor: str = "inline") -> JobSpec:
        place = {"executor": "ray", "address": self.cluster.address, "num_actors": 1} if executor == "ray" else {}
        if real:
            return job_spec(self.model, self.few_prompts, out, **REAL_SETTINGS, **place)
        return job_spec(self.model, self.prompts, out, **SETTINGS, **place)

    @property
    def environment(self) -> dict[str, str]:
        """What drivers need to find the S3 server and the cluster."""
        return {**self.s3, **self.cluster.client_environment}

    @cached_property
    def undisturbed(self) -> Mapping[bool, Dataset]:
        """By whether a real model drew it."""
        outs = {real: str(self.folder / f"undisturbed-{real}") for real in (False, True)}
        assert run(self.spec(outs[False], real=False)).exit_code == 1
        assert run(self.spec(outs[True], real=True), engine_factory=load_engine).exit_code == 0
        return {real: read_dataset(out) for real, out in outs.items()}


def play(point: CrashPoint, stage: Stage) -> Outcome:
    """Run the job into the trap, then once more without one; both in processes of their own."""
    folder = stage.folder / secrets.token_hex(6)
    folder.mkdir()
    log, rig = folder / "log", Rig(str(folder), real=point.real)
    out = f"s3://test/{folder.name}" if point.store == "S3" else str(folder / "out")
    spec = stage.spec(out, real=point.real, executor=point.executor)
    killed, first_exit = _run_into_trap(point, stage, spec, rig)
    committed = sum(chunk_of_path(path) is not None for path, _ in Storage.open(out).list("ledger"))
    if rig.victim.exists():
        killed, committed = map(int, rig.victim.read_text().split())
    resume = start(spec, log, engine=rig, environment=stage.environment)
    _end(resume, log)
    expected = stage.undisturbed[point.real]
    published = resume.exitcode in {0, 1}
    return Outcome(
        killed=killed,
        committed=committed,
        chunks=REAL_CHUNKS if point.real else CHUNKS,
        exits=(first_exit, resume.exitcode),
        expected_exit=0 if point.real else 1,
        images_made=sum(map(int, rig.tally.read_text().split())),
        samples=len(expected.rows),
        chunk_size=spec.chunk_size,
        equal=published and read_dataset(out) == expected,
        defects=verify(out).defects if published else (),
        log=log.read_text(),
    )


def _end(driver: BaseProcess, log: Path) -> None:
    driver.join(SECONDS)
    if driver.exitcode is None:
        driver.kill()
        driver.join()
        raise TimeoutError(f"the driver ran for more than {SECONDS} s: {log.read_text()}")


def _run_into_trap(point: CrashPoint, stage: Stage, spec: JobSpec, rig: Rig) -> tuple[int, int | None]:
    """The number of the process that died, if that is known here, and the driver's exit code."""
    environment, proxy = stage.environment, None
    with ExitStack() as stack:
        if isinstance(point.trap, AtRequest):
            proxy = stack.enter_context(fault_proxy(stage.s3["AWS_ENDPOINT_URL"], point.trap.rule))
            environment["AWS_ENDPOINT_URL"] = proxy.url
        else:
            in_model = point.victim == "actor" or isinstance(point.trap, AtLoading | AtStep | AtBatch)
            where: Literal["driver", "generator"] = "generator" if in_model else "driver"
            kills_driver = point.executor == "ray" and point.victim == "driver"
            rig = replace(rig, trap=point.trap, where=where, kills_driver=kills_driver)
        driver = start(spec, Path(rig.folder, "log"), engine=rig, environment=environment)
        if proxy is not None:
            proxy.victim = driver.pid
        _end(driver, Path(rig.folder, "log"))
    return (proxy.killed or 0) if proxy is not None else 0, driver.exitcode
