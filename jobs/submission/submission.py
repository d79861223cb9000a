"""Jobs that a cluster runs by itself: submitted once, and found again by their id or their output."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.outputs.status import StatusReport
from latentmill.jobs.outputs.status import status as output_status
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import display_url
from latentmill.jobs.submission.api import ENDED, JobInfo, JobsApi, JobState
from latentmill.jobs.submission.places import check_rows, own_manifests, visible_to_nodes
from latentmill.jobs.submission.portable import (
    SUBMITTED,
    forwarded_variables,
    portable_job_file,
    short_digest,
    uploaded_prompts,
)
from latentmill.jobs.submission.records import (
    JOB_ID,
    cancel_path,
    known_clusters,
    newest_record,
    now,
    record_path,
    record_submission,
    remember_cluster,
)

START = "latentmill/jobs/submission/start.sh"
"""Within the code that is sent, which is the driver's working folder."""

MAX_SUBMISSIONS = 10_000
STATUS_SECONDS = 3.0
"""How long a look at an output waits for a cluster that does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job on a cluster; `started` is False if the same job was pending or running there already."""

    job_id: str
    address: str
    out: str
    state: JobState
    started: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlace:
    """Where a submitted job runs, and the output that led to it, if one did."""

    job_id: str
    address: str
    out: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """An output's report, a job's state, or both; at least one is there."""

    report: StatusReport | None
    job: JobInfo | None

    @property
    def exit_code(self) -> int:
        """1 if the job failed on its cluster, whatever it had done by then."""
        return int(self.job is not None and self.job.state == "failed")

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: the report's keys as they are without a cluster, and `job` where there is one."""
        from dataclasses import asdict

        found = {} if self.report is None else self.report.to_dict()
        return found if self.job is None else found | {"job": asdict(self.job)}


def submit_job(
    spec: JobSpec, *, shared_filesystem: bool = False, forwarded: Sequence[str] = (), api: JobsApi | None = None
) -> Submission:
    """Afterwards the job is on the cluster once: started now, or found there pending or running.

    Everything that the cluster needs and cannot see from there lies under the output. A job that has ended is started
    again: it resumes. Raises UsageError, before anything is written, for what the nodes could not see.
    """
    variables = forwarded_variables(forwarded)
    api = api or _api(_cluster_address(spec.runtime.address))
    spec = visible_to_nodes(spec, shared_filesystem=shared_filesystem)
    manifests = own_manifests(spec)
    check_rows(manifests, spec, shared_filesystem=shared_filesystem)
    if not spec.runtime.insecure_ray:
        api.require_token()
    storage = Storage.open(spec.out).probe(allow_single_writer=spec.runtime.single_writer)
    job_file = portable_job_file(spec, uploaded_prompts(spec, manifests, storage))
    digest = short_digest(job_file)
    place = f"{SUBMITTED}/{digest}/job.yaml"
    storage.create(place, job_file)
    entrypoint = shlex.join(["exec", "sh", START, "run", "--config", f"{spec.out.rstrip('/')}/{place}"])
    base = f"latentmill-{short_digest(job_file + spec.out.encode())}"
    metadata = {"out": display_url(spec.out)}
    for number in range(1, MAX_SUBMISSIONS):
        job_id = base if number == 1 else f"{base}-{number}"
        info = api.info(job_id)
        started = info is None
        if info is None:
            if storage.exists(record_path(job_id)):
                continue  # it ran on another cluster, or before this one was restarted
            started = api.submit(job_id, entrypoint=entrypoint, variables=variables, metadata=metadata)
            info = api.info(job_id)
        info = info and _with_cancel(info, storage)
        if info is not None and (started or info.state not in ENDED):
            record_submission(storage, job_id, api.address)
            remember_cluster(api.address)
            return Submission(
                job_id=job_id, address=api.address, out=metadata["out"], state=info.state, started=started
            )
    raise JobError(f"this job was submitted {MAX_SUBMISSIONS:,} times to {metadata['out']}; use another --out")


def find_job(target: str, address: str | None = None) -> JobPlace:
    """The job of that id, or the one that was last submitted for that output.

    The address in an output is followed only if the user named it, now or by a submission from this machine: whoever
    can write into an output could otherwise have tokens sent to a server of his own.
    """
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if JOB_ID.fullmatch(target):
        return JobPlace(job_id=target, address=_cluster_address(named))
    newest = newest_record(target)
    if newest is None:
        raise UsageError(f"no job was submitted for {display_url(target)}; give a job id, or submit one")
    job_id, recorded = newest
    if named is None and recorded not in known_clusters():
        raise UsageError(
            f"job {job_id} was submitted to {recorded} from another machine; if that is your cluster, say so: "
            f"--address {recorded}"
        )
    return JobPlace(job_id=job_id, address=_cluster_address(named or recorded), out=target)


def job_status(
    target: str,
    *,
    deep: bool = False,
    address: str | None = None,
    api: Callable[..., JobsApi] | None = None,
    read: Callable[[str], StatusReport] | None = None,
) -> JobStatus:
    """How far a job is: its output's own answer, and the state on its cluster if there is one that answers soon.

    `read` looks at the output in place of `status`, for who has looked at it before.
    """
    ask = api or _api
    look = read or (lambda out: output_status(out, deep=deep))
    if JOB_ID.fullmatch(target):
        info = _info(find_job(target, address), ask)
        info = _with_cancel(info, _output(info.out))
        out = info.out
        report = None
        if out is not None:
            with contextlib.suppress(UsageError):  # not planned yet, or an output that only the cluster can see
                report = look(out)
        return JobStatus(report=report, job=info)
    newest = newest_record(target)
    if newest is None:
        return JobStatus(report=look(target), job=None)
    job_id, recorded = newest
    try:
        info = _info(find_job(target, address), lambda place: ask(place, seconds=STATUS_SECONDS))
    except JobError as error:
        info = JobInfo(job_id=job_id, address=recorded, state="unknown", message=str(error))
    info = _with_cancel(info, _output(target))
    report = None
    if info.state not in {"pending", "running", "stopping", "failed"}:
        return JobStatus(report=look(target), job=info)
    with contextlib.suppress(UsageError):  # the driver has not planned yet, or could not
        report = look(target)
    return JobStatus(report=report, job=info)


def job_logs(target: str, write: Callable[[str], None], *, follow: bool = False, address: str | None = None) -> JobInfo:
    """Hand the driver's log to `write`, until the job ends if `follow`; the job's state afterwards."""
    place = find_job(target, address)
    api = _api(place.address)
    if follow:
        api.follow(place.job_id, write)
    else:
        write(api.logs(place.job_id))
    return _info(place, lambda _: api)


def cancel_job(target: str, *, address: str | None = None) -> JobInfo:
    """Afterwards the driver has been told to stop: chunks in flight finish, no more begin, and the job can resume.

    The output records it, since the cluster calls such a job running until its driver has ended.
    """
    place = find_job(target, address)
    api = _api(place.address)
    api.stop(place.job_id)
    info = _info(place, lambda _: api)
    if info.state in ENDED:
        return info
    storage = _output(place.out or info.out)
    if storage is not None:
        with contextlib.suppress(StorageError):  # to be read from here, but not to be written
            storage.create(cancel_path(place.job_id), json.dumps({"cancelled": now()}).encode())
    return replace(info, state="stopping")


def _with_cancel(info: JobInfo, storage: Storage | None) -> JobInfo:
    """A job that goes on and was told to stop is `stopping`, by what the output says, if it can be read from here."""
    if storage is None or info.state not in {"pending", "running"}:
        return info
    with contextlib.suppress(StorageError):
        if storage.exists(cancel_path(info.job_id)):
            return replace(info, state="stopping")
    return info


def _output(out: str | None) -> Storage | None:
    """The output, if it can be opened from here: a job's may be one that only its cluster sees."""
    with contextlib.suppress(JobError):
        return None if out is None else Storage.of_output(out)
    return None


def _info(place: JobPlace, ask: Callable[[str], JobsApi]) -> JobInfo:
    info = ask(place.address).info(place.job_id)
    if info is None:
        raise UsageError(f"the cluster at {place.address} knows no job {place.job_id}; was its head started anew?")
    return info


def _api(address: str, *, seconds: float = 30.0) -> JobsApi:
    from latentmill.jobs.submission.ray_jobs import JobsClient

    return JobsClient(address, seconds=seconds)


def _cluster_address(given: str | None) -> str:
    """The URL of a dashboard. Raises UsageError if there is none, or one with credentials in it."""
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        what = f"{display_url(address)!r} is not the URL of a Ray dashboard" if address else "no cluster is named"
        raise UsageError(f"{what}; give --address http://HEAD:8265")
    if "@" in address or "?" in address:
        raise UsageError("the address of the cluster carries credentials; leave them out, Ray's token lies in a file")
    return address.rstrip("/")
