"""The jobs API of a Ray head: our code and a command in, the driver's state and log out. Nothing is sent unasked."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from latentmill.jobs.code import code_files, package_root
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.ray_cluster import locked_out_text, open_cluster_text
from latentmill.jobs.executors.ray_private import own_token
from latentmill.jobs.ledger.records import tool_versions
from latentmill.jobs.submission.api import JobInfo, JobState
from latentmill.jobs.terminal import held_back_stderr

STOP_SECONDS = 900
"""How long Ray lets a stopped driver finish its chunks in flight before it kills it; its own patience is 3 s."""

_STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
}


class JobsClient:
    """A client of one cluster. The token goes to that address only, and only if the address asks for one."""

    def __init__(self, address: str, *, seconds: float = 30.0) -> None:
        self.address = address
        self._seconds = seconds
        self._opener = urllib.request.build_opener(_NoRedirects)

    def require_token(self) -> None:
        """Raises UsageError if the cluster takes jobs from anyone, or does not take this client's token."""
        if not self._guarded:
            raise UsageError(open_cluster_text(self.address))
        self._ask("GET", "/api/version")

    def submit(self, job_id: str, *, entrypoint: str, variables: dict[str, str], metadata: dict[str, str]) -> bool:
        """Send our code and start the command; False if there is a job of that id.

        Its variables are not secret: the cluster keeps them in clear text, for everyone who holds its token.
        """
        with tempfile.TemporaryDirectory() as folder, self._sdk() as client:
            environment = {
                "working_dir": str(pack_code(Path(folder))),
                "env_vars": {**variables, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            }
            try:
                client.submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=metadata
                )
            except RuntimeError as error:
                if self.info(job_id) is None:
                    raise JobError(f"the cluster at {self.address} refused the job: {_one_line(error)}") from error
                return False
        return True

    def info(self, job_id: str) -> JobInfo | None:
        """The job as the cluster sees it; None if it knows no such job."""
        found = self._ask("GET", f"/api/jobs/{job_id}", missing=True)
        if found is None:
            return None
        metadata = found.get("metadata") or {}
        return JobInfo(
            job_id=job_id,
            address=self.address,
            state=_STATES.get(str(found.get("status")), "unknown"),
            exit_code=found.get("driver_exit_code"),
            message=str(found.get("message") or ""),
            out=metadata.get("out"),
        )

    def stop(self, job_id: str) -> bool:
        """Ask the driver to stop; False if it had ended before."""
        answer = self._ask("POST", f"/api/jobs/{job_id}/stop")
        return bool(answer and answer.get("stopped"))

    def logs(self, job_id: str) -> str:
        """All that the driver has said so far."""
        answer = self._ask("GET", f"/api/jobs/{job_id}/logs")
        return str((answer or {}).get("logs") or "")

    def follow(self, job_id: str, write: Callable[[str], None]) -> None:
        """Hand on what the driver says, from its first word, until it ends."""

        async def tail(client: Any) -> None:
            async for text in client.tail_job_logs(job_id):
                write(text)

        with self._sdk() as client:
            try:
                asyncio.run(tail(client))
            except (RuntimeError, OSError) as error:
                raise JobError(
                    f"the log of {job_id} broke off: {_one_line(error)}; the job goes on without it: latentmill logs "
                    f"{job_id} --follow"
                ) from error

    @cached_property
    def _guarded(self) -> bool:
        """Whether the head sends away a caller without a token."""
        return self._status("GET", "/api/version", {})[0] in {401, 403}

    @cached_property
    def _headers(self) -> dict[str, str]:
        return own_token() if self._guarded else {}

    def _ask(self, method: str, path: str, *, missing: bool = False) -> dict[str, Any] | None:
        """The answer's object; None for a 404, if that may be."""
        code, body = self._status(method, path, self._headers)
        if code in {401, 403}:
            raise UsageError(locked_out_text(self.address))
        if code == 404 and missing:
            return None
        try:
            answer = json.loads(body) if code == 200 else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            words = " ".join(body.decode("utf-8", "replace").split())[:200]
            raise JobError(f"the cluster at {self.address} answered {code} to {method} {path}: {words}")
        return answer

    def _status(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        request = urllib.request.Request(self.address + path, method=method, headers=headers)  # noqa: S310 - http(s) only
        try:
            with self._opener.open(request, timeout=self._seconds) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise UsageError(f"no Ray dashboard answers at {self.address}: {reason}; check --address") from error

    @contextmanager
    def _sdk(self) -> Iterator[Any]:
        """Ray's own client, for this address: left alone, it would follow RAY_ADDRESS in place of what it is told."""
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        before = {name: os.environ.pop(name) for name in names if name in os.environ}
        try:
            with held_back_stderr():
                client = JobSubmissionClient(self.address, headers=dict(self._headers))
            yield client
        except (AuthenticationError, ConnectionError) as error:
            raise UsageError(f"the cluster at {self.address} cannot be used: {_one_line(error)}") from error
        finally:
            os.environ |= before


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would take the token along to wherever it leads."""

    def redirect_request(self, *_: Any) -> Literal[None]:
        return None


def pack_code(folder: Path) -> Path:
    """The package that runs here as a zip: driver and workers run this very code, whatever their nodes have installed.

    The same code gives the same bytes, which a cluster then keeps once. Tests and the training recipe stay behind.
    """
    root = package_root()
    version = tool_versions()["latentmill"]
    target = folder / "latentmill.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(code_files(root)):
            _add(archive, f"latentmill/{path.relative_to(root).as_posix()}", path.read_bytes())
        about = f"Metadata-Version: 2.1\nName: latentmill\nVersion: {version}\n"
        _add(archive, f"latentmill-{version}.dist-info/METADATA", about.encode())
    return target


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), data, compress_type=zipfile.ZIP_DEFLATED)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
