"""How long a planned job will take, and what it will cost: measured here, or from an earlier output's records."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from latentmill.engine import EngineError, GenerationRequest, count_passes, passes
from latentmill.jobs.errors import UsageError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.plans.draft import DraftPlan
from latentmill.jobs.plans.grid import Group, Section
from latentmill.jobs.plans.summary import Estimate, PlanSummary, section_passes
from latentmill.jobs.plans.work import pixels_of
from latentmill.jobs.worker import ChunkEngine, load_model

MAX_RECORDS_READ = 200
"""Commit records of an earlier output that its rate comes from, spread over its chunks."""

_MAX_SHAPES_MEASURED = 3
_FEW_STEPS, _MORE_STEPS = 2, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rate:
    """Seconds for each run of the denoiser, and for each batch besides, per pixel and row that is guided or not."""

    seconds_per_pass: float
    seconds_per_batch: float = 0.0


def with_estimate(
    draft: DraftPlan, summary: PlanSummary, *, measure: bool, rate_from: str | None, price: float | None
) -> PlanSummary:
    """The summary of a draft with the time that a run takes: measured here, or by an earlier output. Writes nothing.

    Raises UsageError for a price without a time, and for an earlier output that says nothing of this job's time.
    """
    if measure and rate_from is not None:
        raise UsageError("--measure and --rate-from both say how long a job takes; give one of them")
    if price is not None and not 0 <= price < math.inf:
        raise UsageError(f"--gpu-hour-price {price} is no price; give a number from 0 up")
    if rate_from is not None:
        seconds, source = _from_output(draft, rate_from)
    elif measure:
        seconds, source = _measured(draft)
    else:
        raise UsageError("--gpu-hour-price needs the time that a job takes: say --measure, or --rate-from OUT")
    runtime = draft.spec.runtime
    models = runtime.num_actors or 1
    gpus = 1.0 if runtime.gpus_per_actor is None else runtime.gpus_per_actor
    cost = None if price is None else seconds / 3600 * gpus * price
    estimate = Estimate(seconds=seconds, elapsed=seconds / models, models=models, source=source, cost=cost)
    return replace(summary, estimate=estimate)


def _measured(draft: DraftPlan) -> tuple[float, str]:
    """Seconds for all sections, from batches of the shapes that most work is of."""
    identity = draft.identity
    settings = replace(draft.spec, dtype=identity["dtype"], threads_per_actor=identity["threads_per_actor"])
    batch_size = int(identity["batch_size"])
    seconds, source = 0.0, ""
    for number, model in enumerate(draft.models):
        if model.fault is not None:
            continue
        engine = load_model(model, settings, batch_size, identity["device"])
        seconds += _measured_model(draft, number, engine, batch_size)
        source = f"measured here: {engine.execution_class}"
        del engine  # before the next one comes
    return seconds, source


def _measured_model(draft: DraftPlan, number: int, engine: ChunkEngine, batch_size: int) -> float:
    sections = [section for section in draft.grid.sections if section.groups[0].model == number]
    sections.sort(key=lambda section: -_work(section, draft, batch_size))
    rates: dict[tuple[int, int, bool], _Rate] = {}
    for section in sections:
        shape = section.groups[0].key[:3]
        if shape not in rates and len(rates) < _MAX_SHAPES_MEASURED:
            rates[shape] = _time_batches(engine, max(section.groups, key=lambda group: group.n_samples), batch_size)
    seconds = 0.0
    for section in sections:
        shape = section.groups[0].key[:3]
        nearest = min(rates, key=lambda known: (known != shape, abs(pixels_of(known) - pixels_of(shape))))
        rate, times = rates[nearest], pixels_of(shape) / pixels_of(nearest)
        n_passes = section_passes(section, draft.grid.chunk_size, batch_size)
        n_batches = -(-section.n_samples // batch_size)
        seconds += times * (n_passes * rate.seconds_per_pass + n_batches * rate.seconds_per_batch)
    return seconds


def _time_batches(engine: ChunkEngine, group: Group, batch_size: int) -> _Rate:
    """Two batches with few and with more steps: what differs is the denoiser's, the rest comes once for each batch."""
    width, height, guided, steps, sampler = group.key

    def timed(n_steps: int) -> float:
        request = GenerationRequest(
            prompt="",
            seed=0,
            width=width,
            height=height,
            num_inference_steps=n_steps,
            guidance_scale=2.0 if guided else 1.0,
            sampler=sampler,
        )
        started = time.perf_counter()
        engine.generate([replace(request, seed=seed) for seed in range(batch_size)])
        return time.perf_counter() - started

    few, more = (_FEW_STEPS, min(steps, _MORE_STEPS)) if steps > _FEW_STEPS else (steps, steps)
    try:
        timed(few)  # the first batch also compiles, allocates and reads files
        short, long = timed(few), timed(more)
    except EngineError:  # some samplers do not take every number of steps; the planned one they take
        few = more = steps
        timed(few)
        short = long = timed(few)
    few_passes, more_passes = passes((sampler, few)), passes((sampler, more))
    if more_passes == few_passes:
        return _Rate(seconds_per_pass=long / more_passes)
    per_pass = max(0.0, (long - short) / (more_passes - few_passes))
    return _Rate(seconds_per_pass=per_pass, seconds_per_batch=max(0.0, short - few_passes * per_pass))


def _from_output(draft: DraftPlan, url: str) -> tuple[float, str]:
    """Seconds by the rate of the chunks of an earlier output, as its commit records say it."""
    job = open_job(url)
    theirs, ours = ({model.family for model in models} for models in (job.plan.models, draft.models))
    if theirs != ours:
        raise UsageError(
            f"{job.storage.url} was made by {', '.join(sorted(theirs))}, this job's models are "
            f"{', '.join(sorted(ours))}; name an output of the same family, or say --measure"
        )
    seconds = work = 0.0
    classes: set[str] = set()
    for chunk in _some(np.flatnonzero(job.ledger.committed()).tolist()):
        record = job.ledger.read(chunk)
        taken = 0.0 if record is None else float(record.metadata.get("generate_seconds", 0))
        if record is not None and taken:
            seconds += taken
            work += _chunk_work(job, chunk)
            classes.add(record.execution_class)
    if not work:
        raise UsageError(f"{job.storage.url} has no chunk whose time is known; name another output, or say --measure")
    batch_size = int(draft.identity["batch_size"])
    needed = sum(_work(section, draft, batch_size) for section in draft.grid.sections)
    return needed * seconds / work, f"from {job.storage.url}: {', '.join(sorted(classes))}"


def _some(chunks: Sequence[int]) -> list[int]:
    step = max(1, len(chunks) // MAX_RECORDS_READ)
    return list(chunks[::step])


def _chunk_work(job: Job, chunk: int) -> float:
    section, start, stop = job.plan.grid.section_of(chunk)
    loops = [group.loop for group, first, last in section.cut(start, stop) for _ in range(first, last)]
    size = pixels_of(section.groups[0].key[:3])
    return count_passes(loops, job.plan.batch_size) * job.plan.batch_size * size


def _work(section: Section, draft: DraftPlan, batch_size: int) -> float:
    """What grows with the time that a section takes: pixels that go through the denoiser."""
    n_passes = section_passes(section, draft.grid.chunk_size, batch_size)
    return float(n_passes * batch_size * pixels_of(section.groups[0].key[:3]))
