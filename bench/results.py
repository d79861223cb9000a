"""One JSON document for each benchmark and kind of device: a later run takes its place, and nothing else's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Figure, figure
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"
BUSY_CORES = 0.5
"""A machine with more cores busy than this before the benchmark began had something else to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a benchmark found, where and when."""

    name: str
    device: str
    command: str
    commit: str
    date: str
    seconds: float
    tiny: bool
    machine: Mapping[str, Any]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the figures must know: how equal the pictures are, what was left out."""
    details: Mapping[str, Any]
    """What else was seen, for whoever looks closer."""

    @property
    def busy(self) -> bool:
        return bool(self.machine.get("cores_busy", self.machine["load_1min"]) > BUSY_CORES)

    @property
    def before(self) -> str:
        """How busy the machine was. Older documents have the load of a minute, which knows the benchmark before it."""
        cores = self.machine.get("cores_busy")
        load = f"load of the minute {self.machine['load_1min']:g}, the benchmark before it included"
        return load if cores is None else f"{cores:g} cores busy"

    def figure(self, name: str) -> Figure | None:
        """The figure of that name, if this result has it."""
        return next((each for each in self.figures if each.name == name), None)

    def as_json(self) -> str:
        """The document, one value to a line so that changes are seen."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields |= {"figures": [each.as_json() for each in self.figures], "busy": self.busy}
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def parse(text: str) -> Result:
    """A result from its document."""
    fields = json.loads(text)
    fields.pop("busy")
    fields["figures"] = tuple(figure(each["name"], each["unit"], each["values"]) for each in fields["figures"])
    return Result(**fields | {"notes": tuple(fields["notes"])})


def path_of(folder: Path, device: str, name: str) -> Path:
    """Where the document of a benchmark lies; `device` is `cpu` or `cuda`."""
    return folder / device / f"{name}.json"


def store(folder: Path, device: str, result: Result) -> Path:
    """Write the document, whole or not at all."""
    path = path_of(folder, device, result.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(result.as_json())
    return temporary.replace(path)


def stored(folder: Path, device: str, name: str) -> Result | None:
    """What is known of a benchmark."""
    path = path_of(folder, device, name)
    return parse(path.read_text()) if path.is_file() else None


def all_stored(folder: Path) -> Iterator[tuple[str, Result]]:
    """Every document, with its kind of device."""
    for path in sorted(folder.glob("*/*.json")):
        if not path.name.startswith("."):
            yield path.parent.name, parse(path.read_text())
