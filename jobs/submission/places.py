"""Which places of a job only this machine has: those of settings and axes, and those that rows of manifests name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.executor_table import EXECUTORS
from latentmill.jobs.manifests.coerce import coerce
from latentmill.jobs.manifests.fields import FIELDS, MODEL, shorten
from latentmill.jobs.manifests.manifest import Manifest, Source, open_manifest
from latentmill.jobs.models.cache import is_single_file
from latentmill.jobs.models.presets import split_source
from latentmill.jobs.spec import JobSpec

ROW_PLACES = ("image", "mask", MODEL)
"""Columns whose values are places. A relative image begins in the manifest's folder, a relative model in this one."""

_LOCAL = "file://"
_ONE_PROCESS = "memory://"
_REMEDY = (
    "give a URL that every node sees, such as s3://bucket/prefix, or say --shared-filesystem if all nodes mount the "
    "same path"
)


def visible_to_nodes(spec: JobSpec, *, shared_filesystem: bool) -> JobSpec:
    """The job with paths that mean the same on other machines. Raises UsageError for what the nodes would not find."""
    if not EXECUTORS[spec.runtime.executor].on_ray:
        raise UsageError(f"executor {spec.runtime.executor} does not run on a cluster; leave --executor out")
    nodes = _Nodes(shared_filesystem)
    spec = replace(
        spec,
        out=nodes.path("out", spec.out),
        model=nodes.model("model", spec.model),
        tokenizer=None if spec.tokenizer is None else nodes.model("tokenizer", spec.tokenizer),
        lora={name: nodes.path(f"lora {name}", text) for name, text in spec.lora.items()},
        runtime=replace(spec.runtime, reuse=tuple(nodes.path("reuse", donor) for donor in spec.runtime.reuse)),
    )
    if MODEL in spec.sweep:
        swept = [nodes.model("sweep model", str(model)) for model in spec.sweep[MODEL]]
        spec = replace(spec, sweep={**spec.sweep, MODEL: swept})
    given = {name: getattr(spec, name) for name in ("vae", "preview_decoder", "wildcards")}
    seen: dict[str, Any] = {name: nodes.path(name, place) for name, place in given.items() if place is not None}
    return replace(spec, **seen)


def own_manifests(spec: JobSpec) -> dict[str, Manifest]:
    """The manifests on this machine, by what names them; the cluster gets copies, and reads those at URLs itself."""
    for pattern in spec.prompts:
        _check_shared("manifest", pattern, pattern)
    return {
        pattern: open_manifest([pattern], spec.manifest_format, accept_aliases=spec.accept_aliases)
        for pattern in spec.prompts
        if _is_local(pattern)
    }


def check_rows(manifests: Mapping[str, Manifest], spec: JobSpec, *, shared_filesystem: bool) -> None:
    """Raises UsageError for a row that names a place which the nodes would not find. An axis overrides its column."""
    nodes = _Nodes(shared_filesystem)
    for manifest in manifests.values():
        for source in manifest.sources:
            columns = [name for name in ROW_PLACES if name in source.layout.own and name not in spec.sweep]
            if columns:
                _check_source(source, columns, nodes)


def _check_source(source: Source, columns: Iterable[str], nodes: _Nodes) -> None:
    for batch in source.batches():
        for name in columns:
            if name not in batch.columns:
                continue
            fine: set[str | None] = {None, ""}
            for line, place in zip(batch.lines, coerce(FIELDS[name], batch.columns[name], {}).to_pylist(), strict=True):
                if place not in fine:
                    nodes.check_row(f"{source.name}, row {line}: {name}", name, place)
                    fine.add(place)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """What the nodes of a cluster can see: URLs, and all paths of this machine if they mount its disks."""

    shared_filesystem: bool

    def path(self, name: str, place: str) -> str:
        """A path or URL as nodes have it. Raises UsageError for one that they have not."""
        self._check(name, place, place)
        return _absolute(place) if _is_local(place) else place

    def model(self, name: str, source: str) -> str:
        """The same for what may also be a preset, PRESET=PLACE or a hub id."""
        _, place = split_source(source)
        if place is None or not _is_place(place):
            return source
        self._check(name, source, place)
        return source.removesuffix(place) + (_absolute(place) if _is_local(place) else place)

    def check_row(self, name: str, column: str, text: str) -> None:
        """Raises UsageError unless the nodes find what a row names. Rows are sent as they are: no path is changed."""
        place = split_source(text)[1] if column == MODEL else text
        if place is None or (column == MODEL and not _is_place(place)):
            return
        shown = shorten(text, 200)
        self._check(name, shown, place)
        if _is_local(place) and not place.removeprefix(_LOCAL).startswith("/"):
            begins = "this folder" if column == MODEL else "the manifest's folder"
            raise UsageError(
                f"{name} {shown} begins in {begins}, but the cluster reads a copy of the manifest elsewhere; write its "
                f"whole path, or a URL"
            )

    def _check(self, name: str, shown: str, place: str) -> None:
        _check_shared(name, shown, place)
        if _is_local(place) and not self.shared_filesystem:
            raise UsageError(f"{name} {shown} is a path of this machine; {_REMEDY}")


def _check_shared(name: str, shown: str, place: str) -> None:
    if place.startswith(_ONE_PROCESS):
        raise UsageError(f"{name} {shown} lives in one process only; give a URL that every node sees")


def _is_local(place: str) -> bool:
    return "://" not in place or place.startswith(_LOCAL)


def _is_place(text: str) -> bool:
    """Whether it is a URL or a path, and not a hub id: a path that is there, or looks like nothing else."""
    if not _is_local(text) or text.startswith((_LOCAL, "/", "~", "./", "../")) or is_single_file(text):
        return True
    return Path(text).exists()


def _absolute(place: str) -> str:
    return os.path.abspath(os.path.expanduser(place.removeprefix(_LOCAL)))  # noqa: PTH100, PTH111 - the path may be a mount
