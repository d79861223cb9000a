"""What an output and this machine remember of submitted jobs, so that an output alone leads to its job again."""

from __future__ import annotations

import contextlib
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import display_url

SUBMISSIONS = "_job/submissions"
JOB_ID = re.compile(r"latentmill-[0-9a-f]{16}(-[0-9]{1,5})?")


def record_path(job_id: str) -> str:
    """Where an output keeps that the job was submitted."""
    return f"{SUBMISSIONS}/{job_id}.json"


def cancel_path(job_id: str) -> str:
    """Where it keeps that the job was told to stop."""
    return f"{SUBMISSIONS}/{job_id}.cancelled"


def record_submission(storage: Storage, job_id: str, address: str) -> None:
    """Afterwards the output leads to the job."""
    storage.create(record_path(job_id), json.dumps({"address": address, "submitted": now()}).encode())


def now() -> str:
    """The time in UTC; as text it sorts by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def newest_record(out: str) -> tuple[str, str] | None:
    """Id and cluster of the job that was submitted last for an output. Any other file is ignored."""
    storage = Storage.open(out)
    found = []
    for path, _ in storage.list(SUBMISSIONS):
        job_id = path.rpartition("/")[2].removesuffix(".json")
        if not JOB_ID.fullmatch(job_id):
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError, RecursionError):
            content = json.loads(storage.read(path))
            found.append((str(content["submitted"]), job_id, display_url(str(content["address"]))))
    return None if not found else max(found)[1:]


def _clusters_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "latentmill" / "clusters"


def known_clusters() -> set[str]:
    """The clusters that this machine's user has named."""
    try:
        return set(_clusters_file().read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return set()


def remember_cluster(address: str) -> None:
    """Afterwards an output alone leads back to this cluster."""
    if address in known_clusters():
        return
    with contextlib.suppress(OSError):  # a home that cannot be written to: --address then has to be given again
        path = _clusters_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{address}\n")
