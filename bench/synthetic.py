"""Inputs of any size, made quickly: manifests, ledgers, whole committed outputs, an engine of no cost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.engine import GenerationRequest, GenerationResult, SafetyVerdict
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.ledger import PER_FOLDER, record_path
from latentmill.jobs.ledger.pictures import encode_png, pixel_sha256
from latentmill.jobs.ledger.records import encode_record
from latentmill.jobs.plans.plan import Plan, PlannedSample
from latentmill.jobs.spec import JobSpec, make_spec

SIDE = 64
_ATTEMPT = "0123456789abcdef"
_WRITE_ROWS = 100_000


def job_spec(manifest: Path, out: Path | str, **settings: Any) -> JobSpec:
    """A job of small pictures with the model that ships; the model is only looked at, never loaded."""
    small: dict[str, Any] = {"width": SIDE, "height": SIDE, "num_inference_steps": 1, "executor": "inline"}
    small |= {"safety": "none", "watermark": "none", "prompts": str(manifest), "out": str(out)}
    return make_spec(small | settings)


def write_manifest(path: Path, rows: int, *, num_images: int = 1) -> Path:
    """A Parquet manifest of distinct prompts, with a column of our own and one that is carried."""
    schema = pa.schema([("prompt", pa.string()), ("num_images", pa.int64()), ("source", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _WRITE_ROWS):
            numbers = pa.array(np.arange(start, min(start + _WRITE_ROWS, rows))).cast(pa.string())
            prompts = pc.binary_join_element_wise(
                "a photograph of a small red circle on a blue ground, number", numbers, " "
            )
            images = pa.array(np.full(len(numbers), num_images))
            sources = pc.binary_join_element_wise("collection", numbers, "/")
            writer.write_table(pa.Table.from_arrays([prompts, images, sources], schema=schema))
    return path


def fill_ledger(out: Path, n_chunks: int, *, open_every: int) -> int:
    """Names of commit records for all chunks but those that `open_every` divides; returns how many there are."""
    count = 0
    for first in range(0, n_chunks, PER_FOLDER):
        folder = (out / record_path(first)).parent
        folder.mkdir(parents=True)
        record = folder / ".record"  # one file per folder: a file system allows some 65,000 links to each
        record.write_bytes(b"record")
        for chunk in range(first, min(first + PER_FOLDER, n_chunks)):
            if chunk % open_every:
                os.link(record, out / record_path(chunk))
                count += 1
        record.unlink()
    return count


def fill_output(job: Job, out: Path) -> None:
    """Commit every chunk with true records; all rows have one picture's bytes, under names of their own."""
    pixels = _pixels(SIDE)
    data = encode_png(pixels, "")
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pixel_sha256": pixel_sha256(pixels)}
    for chunk in range(job.plan.n_chunks):
        samples = job.plan.samples_of_chunk(chunk)
        folder = out / f"images/{chunk // PER_FOLDER:05d}/{chunk:08d}-{_ATTEMPT}"
        folder.mkdir(parents=True)
        picture = folder / f"{samples[0].sample_id}.png"
        picture.write_bytes(data)
        for sample in samples[1:]:
            os.link(picture, folder / f"{sample.sample_id}.png")
        places = [(folder / f"{sample.sample_id}.png").relative_to(out).as_posix() for sample in samples]
        rows = [_row(job.plan, sample, about | {"image": place}) for sample, place in zip(samples, places, strict=True)]
        record = encode_record(
            rows,
            job.ledger.schema,
            chunk=chunk,
            attempt=_ATTEMPT,
            plan_hash=job.plan.plan_hash,
            execution_class="synthetic",
            versions={},
        )
        path = out / record_path(chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record)


def _row(plan: Plan, sample: PlannedSample, picture: dict[str, Any]) -> dict[str, Any]:
    request = sample.request
    asked = {name: getattr(request, name) for name in request.__dataclass_fields__ if name in plan.record_schema.names}
    made: dict[str, Any] = {"status": "ok", "nsfw_checker": "none", "watermark": "none", "execution_class": "synthetic"}
    made |= {"prompt_tokens": 12, "precision": "fp32", "batch_size": plan.batch_size}
    ids = {"sample_id": sample.sample_id, "row_id": sample.row_id}
    return (
        dict.fromkeys(plan.record_schema.names)
        | sample.extra
        | ids
        | asked
        | made
        | plan.constants_of(sample.model)
        | picture
    )


@dataclass
class InstantEngine:
    """One picture for every request, at no cost."""

    batch_size: int
    execution_class: str = "synthetic"

    def sample(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        """What `check` takes: results that need no more checking."""
        return self.generate(requests)

    def check(self, sampled: Sequence[Any]) -> list[GenerationResult]:
        """The verdicts are there already."""
        return list(sampled)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        verdict = SafetyVerdict(checker="none", score=0.0, flagged=False)
        return [
            GenerationResult(
                pixels=_pixels(request.width),
                error=None,
                safety=verdict,
                prompt_tokens=12,
                precision="fp32",
                batch_size=self.batch_size,
                batch_slot=slot % self.batch_size,
            )
            for slot, request in enumerate(requests)
        ]


def instant_engine(plan: Plan, device: str) -> InstantEngine:  # noqa: ARG001 - the shape of an engine factory
    """The engine factory of measurements that leave the model out."""
    return InstantEngine(batch_size=plan.batch_size)


def _pixels(side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=2).copy()
