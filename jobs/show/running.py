"""A run that is shown while it goes on: as a bar, as lines, or as events."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from latentmill.jobs.show.display import progress_view
from latentmill.jobs.show.events import event_log

if TYPE_CHECKING:
    from latentmill.jobs.runner import RunSummary
    from latentmill.jobs.spec import JobSpec

STOPPING = "stopping; press Ctrl-C again to stop at once. Nothing that is committed is lost"


def run_shown(config: str | None, flags: Mapping[str, Any], *, quiet: bool) -> RunSummary:
    """Run the job of these flags and show how it goes on. Raises what `run_job` raises.

    The view comes before the imports of a run, which take a second; with a job file it waits for that, which may ask
    for events.
    """
    spec = None if config is None else _resolve(config, flags)
    as_events = flags.get("log_json") or (spec is not None and spec.runtime.log_json)
    with ExitStack() as stack:
        log = stack.enter_context(event_log()) if as_events else None
        view = log or stack.enter_context(progress_view(quiet=quiet))
        spec = spec or _resolve(config, flags)
        from latentmill.jobs.runner import run_job

        summary = run_job(
            spec,
            on_progress=view.update,
            on_stop=lambda: log.stopping(STOPPING) if log is not None else view.note(STOPPING),
            on_stage=view.stage,
            on_note=view.note,
            on_plan=_ignored if log is None else log.plan,
        )
        if log is not None:
            log.finished(summary)
    return summary


def _resolve(config: str | None, flags: Mapping[str, Any]) -> JobSpec:
    from latentmill.jobs.job_file import resolve

    return resolve(config, flags, or_sample=True)


def _ignored(*_: object) -> None:
    pass
