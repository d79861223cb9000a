"""A job as another machine can run it: what is sent to a cluster, or put into the output for it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.manifest import Manifest
from latentmill.jobs.spec import JobSpec, given_settings
from latentmill.jobs.store.storage import Storage

SUBMITTED = "_job/submitted"
MAX_MANIFEST_BYTES = 2 * 2**30

_SAFE_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def forwarded_variables(names: Sequence[str]) -> dict[str, str]:
    """The variables to hand on, with their values. Raises UsageError for one that is not set."""
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise UsageError("--env takes the name of a variable, not its value: --env HF_TOKEN")
        if name not in os.environ:
            raise UsageError(f"--env {name}: there is no such variable here; set it, or leave it out")
    return {name: os.environ[name] for name in names}


def uploaded_prompts(spec: JobSpec, manifests: Mapping[str, Manifest], storage: Storage) -> list[str]:
    """The manifest as URLs; afterwards every local file of it lies in the output, under its content's name."""
    urls = []
    for pattern in spec.prompts:
        if pattern not in manifests:
            urls.append(pattern)
            continue
        for source in manifests[pattern].sources:
            if source.fs.size(source.path) > MAX_MANIFEST_BYTES:
                raise UsageError(
                    f"manifest {source.name} has more than {MAX_MANIFEST_BYTES:,} bytes; copy it to a bucket and name "
                    f"it there"
                )
            data = Path(source.path).read_bytes()
            name = _SAFE_NAME.sub("-", Path(source.path).name)[-100:].lstrip(".-")
            path = f"{SUBMITTED}/{short_digest(data)}/{name}"
            storage.create(path, data)
            urls.append(f"{spec.out.rstrip('/')}/{path}")
    return urls


def portable_job_file(spec: JobSpec, prompts: list[str]) -> bytes:
    """The whole job as a job file: what was said by file and flags, and nothing of how it was sent."""
    settings = {name: value for name, value in given_settings(spec).items() if name != "address"}
    settings |= {"prompts": prompts, "out": spec.out}
    if spec.dated is not None:
        # the template, for the pointer's sake; and the date, for the cluster may begin after midnight
        template = f"{spec.out.rpartition('/')[0]}/{spec.dated.template.rpartition('/')[2]}"
        settings |= {"out": template, "date": spec.dated.date}
    text: str = yaml.safe_dump(settings, allow_unicode=True)
    return text.encode()


def short_digest(data: bytes) -> str:
    """The first digits of the sha256: a name for what has this content."""
    return hashlib.sha256(data).hexdigest()[:16]
