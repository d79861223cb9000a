"""Runs jobs in processes of their own, which die by SIGKILL where a test says, and compares what is left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentmill.jobs.outputs.publish import find_manifest
from latentmill.jobs.runner import RunSummary, run_job
from latentmill.jobs.spec import JobSpec, make_spec
from latentmill.jobs.store.parquet import read_parquet
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import EngineFactory
from tests.jobs.fakes import fake_engine
from tests.jobs.traps import KillAt, Rig, arm

_STORE_SETTINGS = ("AWS_", "AZURE_", "GCSFS_", "STORAGE_EMULATOR_")

# Children are forked from a server that has imported everything and runs nothing: they start at once, and are real.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.jobs.driver", "transformers"])


def job_spec(model: Path | str, prompts: Path | str, out: Path | str, **settings: Any) -> JobSpec:
    """A small, fast job: 64 px, no watermark, chunks of two."""
    small: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "watermark": "none", "chunk_size": 2}
    small |= {"batch_size": 2, "executor": "inline"}
    return make_spec({"model": str(model), "prompts": str(prompts), "out": str(out), **small, **settings})


def run(spec: JobSpec, **options: Any) -> RunSummary:
    """Run a job here, with the fake engine unless told otherwise."""
    return run_job(spec, **{"engine_factory": fake_engine, **options})


def start(
    spec: JobSpec,
    log: Path,
    *,
    kill_at: KillAt | None = None,
    engine: EngineFactory = fake_engine,
    environment: Mapping[str, str] | None = None,
) -> multiprocessing.Process:
    """Run a job in a process of its own; its exit code is the job's, its words go to `log`."""
    aws = {name: value for name, value in os.environ.items() if name.startswith(_STORE_SETTINGS)}
    arguments = (spec, str(log), kill_at, engine, aws | dict(environment or {}))
    process = PROCESSES.Process(target=_drive, args=arguments)
    process.start()
    return process


def _drive(spec: JobSpec, log: str, kill_at: KillAt | None, engine: EngineFactory, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Path(log).open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if kill_at is not None:
            arm(kill_at)
        if isinstance(engine, Rig):
            engine.arm_driver()
        summary = run(spec, engine_factory=engine)
        print(json.dumps({"exit_code": summary.exit_code, "generated": summary.generated}), flush=True)
    sys.exit(summary.exit_code)


@dataclass(frozen=True)
class Dataset:
    """A published dataset as it must be after any history: rows without the attempt, and the files' digests."""

    manifest: dict[str, Any]
    rows: pa.Table
    files: dict[str, str]


def read_dataset(out: str) -> Dataset:
    """What a reader of the published dataset sees."""
    storage = Storage.open(out)
    manifest = json.loads(storage.read(find_manifest(storage)))
    parts = manifest.pop("parts")
    manifest.pop("captions", None)  # of attempts, as the paths of pictures are
    rows = pa.concat_tables([read_parquet(storage.read(part["path"])) for part in parts])
    paths = rows.column("image").to_pylist()
    files = {
        sample: hashlib.sha256(storage.read(path)).hexdigest()
        for sample, path in zip(rows.column("sample_id").to_pylist(), paths, strict=True)
        if path is not None
    }
    place = rows.schema.get_field_index("image")
    anonymous = pa.array([path and re.sub(r"-[0-9a-f]{16}/", "-ATTEMPT/", path) for path in paths], pa.string())
    return Dataset(manifest=manifest, rows=rows.set_column(place, "image", anonymous), files=files)


def pictures(storage: Storage) -> Iterator[tuple[str, int]]:
    """Path and size of every picture that lies there, whoever wrote it."""
    return ((path, size) for path, size in storage.list("images") if path.endswith(".png"))


def committed_generations(log: Path) -> int:
    """Samples that all finished runs in a log generated."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return sum(line["generated"] for line in lines)
