"""A job as another machine can run it: what is sent to a cluster, or put into the output for it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from latentmill.jobs.errors import UsageError
from latentmill.jobs.executor_table import EXECUTORS
from latentmill.jobs.manifests.manifest import open_manifest
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


def visible_to_nodes(spec: JobSpec, *, shared_filesystem: bool) -> JobSpec:
    """The job with paths that mean the same on other machines. Raises UsageError for what the nodes would not find."""
    if not EXECUTORS[spec.runtime.executor].on_ray:
        raise UsageError(f"executor {spec.runtime.executor} does not run on a cluster; leave --executor out")
    if spec.out.startswith("memory://"):
        raise UsageError(f"{spec.out} lives in one process only; give --out as a URL that every node sees")
    local = {"out": spec.out} if _is_local(spec.out) else {}
    local |= {name: value for name, value in _places(spec) if value is not None and _is_on_this_machine(value)}
    loras = {name: text for name, text in spec.lora.items() if _is_local(text)}
    local |= {f"lora {name}": text for name, text in loras.items()}
    models = [str(model) for model in spec.sweep.get("model", ())]
    if any(map(_is_on_this_machine, models)):
        local["sweep model"] = next(filter(_is_on_this_machine, models))
    places = [*local.items(), *(("reuse", donor) for donor in spec.runtime.reuse if _is_local(donor))]
    if places and not shared_filesystem:
        name, value = places[0]
        raise UsageError(
            f"{name} {value} is a path of this machine; give a URL that every node sees, such as s3://bucket/prefix, "
            f"or say --shared-filesystem if all nodes mount the same path"
        )
    absolute: dict[str, Any] = {name: _absolute(value) for name, value in local.items() if name != "sweep model"}
    for name in loras:
        absolute["lora"] = {**absolute.get("lora", spec.lora), name: absolute.pop(f"lora {name}")}
    if "sweep model" in local:
        swept = [_absolute(model) if _is_on_this_machine(model) else model for model in models]
        absolute["sweep"] = {**spec.sweep, "model": swept}
    donors = tuple(_absolute(donor) if _is_local(donor) else donor for donor in spec.runtime.reuse)
    return replace(spec, **absolute, runtime=replace(spec.runtime, reuse=donors))


def _places(spec: JobSpec) -> tuple[tuple[str, str | None], ...]:
    """Where the model's parts and wildcards lie, by the setting that says so."""
    return tuple((name, getattr(spec, name)) for name in ("model", "tokenizer", "vae", "preview_decoder", "wildcards"))


def _is_local(place: str) -> bool:
    return "://" not in place or place.startswith("file://")


def _is_on_this_machine(place: str) -> bool:
    return _is_local(_after_equals(place)) and Path(_after_equals(place)).exists()


def _after_equals(model: str) -> str:
    """The place in `PRESET=PLACE`, or all of it."""
    return model.partition("=")[2] or model


def _absolute(value: str) -> str:
    place = _after_equals(value)
    path = os.path.abspath(os.path.expanduser(place.removeprefix("file://")))  # noqa: PTH100, PTH111 - the path may be a mount
    return value[: len(value) - len(place)] + path


def uploaded_prompts(spec: JobSpec, storage: Storage) -> list[str]:
    """The manifest as URLs; afterwards every local file of it lies in the output, under its content's name."""
    urls = []
    for pattern in spec.prompts:
        if not _is_local(pattern):
            urls.append(pattern)
            continue
        manifest = open_manifest([pattern], spec.manifest_format, accept_aliases=spec.accept_aliases)
        for source in manifest.sources:
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
