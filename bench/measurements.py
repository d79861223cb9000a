"""One measurement each, in a process of its own: `python -m bench.measurements NAME ARGUMENTS`, all in JSON."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import Stopwatch, peak_mib
from bench.synthetic import instant_engine, job_spec
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.publish import publish, standing_publication
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.progress import Progress
from latentmill.jobs.runner import run_job
from latentmill.jobs.store.storage import Storage

Facts = dict[str, Any]


def plan(manifest: str, out: str, settings: Mapping[str, Any]) -> Facts:
    """A new job's plan, read, checked and published; then its last chunk looked up, as a worker would."""
    watch = Stopwatch()
    facts = _plan_and_adopt(manifest, out, settings, watch)
    with watch.measure("last_chunk"):
        job = open_job(out)
        job.plan.samples_of_chunk(job.plan.n_chunks - 1)
    return facts | {"seconds": watch.seconds}


def _plan_and_adopt(manifest: str, out: str, settings: Mapping[str, Any], watch: Stopwatch) -> Facts:
    with watch.measure("draft"):
        draft = draft_plan(job_spec(Path(manifest), out, **settings))
    with draft, watch.measure("adopt"):
        adopt(draft, Storage.open(out))
        return {"rows": draft.n_rows, "samples": draft.grid.n_samples, "chunks": draft.grid.n_chunks}


def draft_only(manifest: str, out: str, settings: Mapping[str, Any]) -> Facts:
    """What `latentmill plan` does: the same reading and checking, and nothing written in the output."""
    watch = Stopwatch()
    with watch.measure("draft"):
        draft = draft_plan(job_spec(Path(manifest), out, **settings))
    with draft:
        return {"rows": draft.n_rows, "seconds": watch.seconds}


def resume(manifest: str, out: str, settings: Mapping[str, Any]) -> Facts:
    """All that comes before the first image of a resumed job, step by step, and `status`."""
    watch = Stopwatch()
    _plan_and_adopt(manifest, out, settings, watch)
    with watch.measure("open"):
        job = open_job(out)
        standing_publication(job)
    with watch.measure("ledger"):
        committed = job.ledger.committed()
    with watch.measure("pending"):
        pending: list[int] = np.flatnonzero(~committed).tolist()
        left = job.plan.n_samples - job.plan.samples_in_chunks(committed)
    with watch.measure("first_chunk"):
        job.plan.samples_of_chunk(pending[0])
    with watch.measure("status"):
        report = status(out)
    return {
        "chunks": job.plan.n_chunks,
        "committed": report.chunks_committed,
        "pending": len(pending),
        "samples_left": left,
        "seconds": watch.seconds,
    }


def first_commit(manifest: str, out: str, settings: Mapping[str, Any]) -> Facts:
    """`latentmill run` on an output that exists, with an engine of no cost, until the first new chunk is committed."""
    watch = Stopwatch()
    seen: list[Progress] = []

    def stop_at_first(progress: Progress) -> None:
        if progress.phase == "generating":
            seen.append(progress)
            raise KeyboardInterrupt

    with watch.measure("run_to_first_commit"):
        run_job(job_spec(Path(manifest), out, **settings), on_progress=stop_at_first, engine_factory=instant_engine)
    return {"chunks_done": seen[0].chunks_done, "seconds": watch.seconds}


def publish_output(out: str) -> Facts:
    """Every commit record and the listing of every attempt read, sorted, and written as the dataset."""
    watch = Stopwatch()
    with watch.measure("publish"):
        publication = publish(open_job(out))
    return {"rows": publication.rows, "parts": len(publication.parts), "seconds": watch.seconds}


def verify_output(out: str) -> Facts:
    """Every record, picture and part read again, every digest taken anew."""
    watch = Stopwatch()
    with watch.measure("verify"):
        report = verify(out)
    if report.defects:
        raise SystemExit(f"the synthetic output is unsound: {report.defects[0]}")
    return {"rows": report.rows, "images": report.images_checked, "seconds": watch.seconds}


def overhead(manifest: str, out: str, settings: Mapping[str, Any]) -> Facts:
    """A whole job with an engine of no cost: what one chunk costs beside its model, from first to last result."""
    moments: list[float] = []

    def note(progress: Progress) -> None:
        if progress.phase == "generating":
            moments.append(watch.elapsed())

    watch = Stopwatch()
    spec = job_spec(Path(manifest), out, **settings)
    with watch.measure("job"):
        summary = run_job(spec, on_progress=note, engine_factory=instant_engine)
    if summary.exit_code:
        raise SystemExit(f"the job ended with exit code {summary.exit_code}")
    per_chunk = (moments[-1] - moments[0]) / (len(moments) - 1)
    return {"chunks": len(moments), "milliseconds_per_chunk": 1000 * per_chunk, "seconds": watch.seconds}


MEASUREMENTS: Mapping[str, Callable[..., Facts]] = {
    function.__name__: function
    for function in (plan, draft_only, resume, first_commit, publish_output, verify_output, overhead)
}


def main(name: str, arguments: str) -> None:
    """Measure, and print the facts with this process's memory and processor time."""
    before = peak_mib()
    facts = MEASUREMENTS[name](**json.loads(arguments))
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts |= {"peak_mib": round(peak_mib(), 1), "peak_before_mib": round(before, 1)}
    facts |= {"cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
