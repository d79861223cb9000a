"""A job that is watched until it ends: its output's ledger, and its state on its cluster if it was submitted to one."""

from __future__ import annotations

import time
from collections.abc import Callable

from latentmill.jobs.outputs.status import StatusReport
from latentmill.jobs.outputs.watch import OutputWatch
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.submission.api import ENDED, JobsApi
from latentmill.jobs.submission.submission import JobStatus, job_status


def watch_job(
    target: str,
    on_look: Callable[[JobStatus], None],
    *,
    every: float,
    deep: bool = False,
    address: str | None = None,
    api: Callable[..., JobsApi] | None = None,
    on_trouble: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> JobStatus:
    """Look at a job every so many seconds until it is published, or has ended on its cluster; the last look.

    A store that does not answer for a while is told to `on_trouble`, and asked again. Raises UsageError if the output
    has no plan and no job is about to make one.
    """
    watches: dict[str, OutputWatch] = {}

    def read(out: str) -> StatusReport:
        if out not in watches:
            watches[out] = OutputWatch(out, deep=deep, clock=clock)
        return watches[out].look()

    while True:
        try:
            answer = job_status(target, deep=deep, address=address, api=api, read=read)
        except StorageError as error:
            if not error.transient:
                raise
            on_trouble(str(error))
        else:
            on_look(answer)
            if has_ended(answer):
                return answer
        sleep(every)


def has_ended(status: JobStatus) -> bool:
    """Whether nothing more is to come: the dataset is published, or the cluster says that the job is over."""
    published = status.report is not None and status.report.published
    return published or (status.job is not None and status.job.state in ENDED)
