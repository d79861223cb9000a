"""Which GPUs of a cluster a job may use: those of one type, because the bits of pictures differ between types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import shorten

_RESOURCE = "accelerator_type:"
_LABEL = "ray.io/accelerator-type"
_UNKNOWN = "a type that Ray does not know"
_A_LITTLE = 0.001
"""Of a node's one unit of its type: so that it says where an actor may be, and not how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerators:
    """The GPUs for a job's actors: their type if it is pinned, how many there are, and how an actor asks for them."""

    type: str | None
    gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    label_selector: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Kind:
    gpus: float = 0.0
    by_resource: bool = True


def choose_accelerators(
    nodes: Iterable[Mapping[str, Any]], *, wanted: str | None = None, allow_mixed: bool = False
) -> Accelerators:
    """The GPUs of `ray.nodes()` that a job may use, pinned to their type so that nodes of another may join.

    Raises UsageError that names the types found: if there are several and none was chosen, or not the chosen one.
    """
    kinds = _kinds(nodes)
    found = ", ".join(f"{name} ({kind.gpus:g} in all)" for name, kind in sorted(kinds.items()))
    if wanted is None and len(kinds) > 1:
        if allow_mixed:
            return Accelerators(type=None, gpus=sum(kind.gpus for kind in kinds.values()))
        known = sorted(kinds.keys() - {_UNKNOWN})
        raise UsageError(
            f"the cluster has GPUs of several types: {found}; the bits of pictures differ between them: choose one by "
            f"--accelerator-type {known[0]}, or allow all by --allow-mixed-accelerators"
        )
    names = {name.lower(): name for name in kinds if name != _UNKNOWN}
    if wanted is not None and wanted.lower() not in names:
        raise UsageError(
            f"accelerator_type {shorten(wanted)}: the cluster has {found or 'no GPU'}; choose one of these by "
            f"--accelerator-type, or add nodes of that type"
        )
    name = names.get(wanted.lower()) if wanted is not None else next(iter(names.values()), None)
    if name is None:
        return Accelerators(type=None, gpus=sum(kind.gpus for kind in kinds.values()))
    if kinds[name].by_resource:
        return Accelerators(type=name, gpus=kinds[name].gpus, resources={f"{_RESOURCE}{name}": _A_LITTLE})
    return Accelerators(type=name, gpus=kinds[name].gpus, label_selector={_LABEL: name})


def _kinds(nodes: Iterable[Mapping[str, Any]]) -> dict[str, _Kind]:
    """The types of GPU on living nodes. Ray tells the type by a resource; somebody's own set-up perhaps by a label."""
    kinds: dict[str, _Kind] = defaultdict(_Kind)
    for node in nodes:
        resources = node.get("Resources", {})
        gpus = float(resources.get("GPU", 0.0))
        if not node.get("Alive") or not gpus:
            continue
        named = sorted(name.removeprefix(_RESOURCE) for name in resources if name.startswith(_RESOURCE))
        kind = kinds["+".join(named) or node.get("Labels", {}).get(_LABEL) or _UNKNOWN]
        kind.gpus += gpus
        kind.by_resource &= len(named) == 1
    return dict(kinds)
