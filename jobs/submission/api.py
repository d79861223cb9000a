"""What submission asks of a cluster, and what a cluster says of a job: ray_jobs.py does it for Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

JobState = Literal["pending", "running", "stopping", "stopped", "succeeded", "failed", "unknown"]
ENDED: frozenset[JobState] = frozenset({"stopped", "succeeded", "failed"})


@dataclass(frozen=True, kw_only=True, slots=True)
class JobInfo:
    """One submitted job as its cluster sees it; `unknown` with a reason if the cluster does not say."""

    job_id: str
    address: str
    state: JobState
    exit_code: int | None = None
    message: str = ""
    out: str | None = None

    @property
    def cli_exit_code(self) -> int:
        """What `run` would have ended with: its own code, 130 if it was stopped, 0 while it goes on."""
        if self.state == "stopped":
            return 130
        return (self.exit_code or 1) if self.state == "failed" else 0


class JobsApi(Protocol):
    """What a cluster's jobs API can do. Each call raises JobError if it does not answer or refuses access."""

    address: str

    def require_token(self) -> None: ...
    def submit(self, job_id: str, *, entrypoint: str, variables: dict[str, str], metadata: dict[str, str]) -> bool: ...
    def info(self, job_id: str) -> JobInfo | None: ...
    def stop(self, job_id: str) -> bool: ...
    def logs(self, job_id: str) -> str: ...
    def follow(self, job_id: str, write: Callable[[str], None]) -> None: ...
