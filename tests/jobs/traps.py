"""Places to die: a process that comes to a trap ends by SIGKILL there, and of all that come only the first one does."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.jobs.fakes import fake_engine


@dataclass(frozen=True)
class KillAt:
    """SIGKILL `before` or `after` the nth call of a storage verb on a path that begins with `prefix`."""

    when: Literal["before", "after"]
    verb: str
    prefix: str
    nth: int = 1


@dataclass(frozen=True)
class AtSync:
    """When the nth file whose path contains `part` is written, but still has its temporary name."""

    part: str
    nth: int = 1


@dataclass(frozen=True)
class AtLoading:
    """While the model is loaded, with so many of its networks in memory."""

    networks: int = 1


@dataclass(frozen=True)
class AtStep:
    """Within a batch, before the nth call of the U-Net."""

    nth: int


@dataclass(frozen=True)
class AtBatch:
    """Before the nth batch of an engine without a model."""

    nth: int


Trap = KillAt | AtSync | AtLoading | AtStep | AtBatch


@dataclass(frozen=True)
class Rig:
    """An engine factory with a trap. Its engine adds the images that it has made to `tally`, a line for each chunk.

    `where` says which process the trap is for: the one that plans and drives, or the one with the model. Who comes to
    the trap dies, or the driver in its place.
    """

    folder: str
    trap: Trap | None = None
    where: Literal["driver", "generator"] = "driver"
    real: bool = False
    kills_driver: bool = False

    @property
    def tally(self) -> Path:
        return Path(self.folder, "tally")

    @property
    def victim(self) -> Path:
        """Holds the number of the process that died in the trap, and the records that stood then, once one has."""
        return Path(self.folder, "victim")

    @property
    def driver(self) -> Path:
        """Holds the number of the process that drives."""
        return Path(self.folder, "driver")

    def arm_driver(self) -> None:
        """Called once in the process that drives."""
        self.driver.write_text(f"{os.getpid()}")
        if self.trap is not None and self.where == "driver":
            arm(self.trap, self.victim)

    def spring(self) -> None:
        """Kill whom this trap is for."""
        spring(self.victim, int(self.driver.read_text()) if self.kills_driver else None)

    def __call__(self, plan: Plan, device: str) -> CountingEngine:
        if self.trap is not None and self.where == "generator":
            arm(self.trap, self.victim)
        engine = load_engine(plan, device) if self.real else fake_engine(plan, device)
        if self.where == "generator" and isinstance(self.trap, AtLoading) and not self.real:
            self.spring()
        return CountingEngine(engine, self)


class CountingEngine:
    """Another engine's pictures, counted."""

    def __init__(self, engine: Any, rig: Rig) -> None:
        self._engine = engine
        self._rig = rig
        self._batches = 0

    @property
    def execution_class(self) -> str:
        name: str = self._engine.execution_class
        return name

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        return self.check(self.sample(requests))

    def check(self, sampled: Sequence[Any]) -> list[GenerationResult]:
        results: list[GenerationResult] = self._engine.check(sampled)
        return results

    def sample(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        self._batches += 1
        rig = self._rig
        if rig.where == "generator" and rig.trap == AtBatch(self._batches):
            rig.spring()
        results: list[Any] = self._engine.sample(requests)
        with rig.tally.open("a") as tally:
            tally.write(f"{len(results)}\n")
        return results


def arm(trap: Trap, victim: Path | None = None) -> None:
    """Set a trap in this process, once. Whoever dies in it writes its number into `victim` first, if there is one."""
    if (trap, victim) in _armed:
        return
    _armed.add((trap, victim))
    if isinstance(trap, KillAt):
        _arm_storage(trap, victim)
    elif isinstance(trap, AtSync):
        _arm_sync(trap, victim)
    elif isinstance(trap, AtLoading):
        _arm_loading(trap, victim)
    elif isinstance(trap, AtStep):
        _arm_steps(trap, victim)


_armed: set[tuple[Trap, Path | None]] = set()


def spring(victim: Path | None, process: int | None = None) -> None:
    """Kill this process or the given one, unless one has died here already."""
    process = process or os.getpid()
    if victim is not None:
        committed = sum(1 for _ in victim.with_name("out").glob("ledger/*/0*.parquet"))
        try:
            with victim.open("x") as file:
                file.write(f"{process} {committed}")
        except FileExistsError:
            return
    os.kill(process, signal.SIGKILL)


class _Counter:
    """Says of the nth call that it is the one; each process counts for itself."""

    def __init__(self, nth: int) -> None:
        self._numbers = itertools.count(1)  # its next is atomic, and storage is called from several threads
        self._nth = nth

    def hit(self) -> bool:
        return next(self._numbers) == self._nth


def _arm_storage(trap: KillAt, victim: Path | None) -> None:
    original: Callable[..., Any] = getattr(Storage, trap.verb)
    counter = _Counter(trap.nth)

    def deadly(self: Storage, path: str, *data: bytes) -> Any:
        hit = path.startswith(trap.prefix) and counter.hit()
        if hit and trap.when == "before":
            spring(victim)
        result = original(self, path, *data)
        if hit:
            spring(victim)
        return result

    setattr(Storage, trap.verb, deadly)


def _arm_sync(trap: AtSync, victim: Path | None) -> None:
    original = os.fsync
    counter = _Counter(trap.nth)

    def deadly(handle: int) -> None:
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        if trap.part in path and path.endswith(".tmp") and counter.hit():
            spring(victim)
        original(handle)

    os.fsync = deadly


def _arm_loading(trap: AtLoading, victim: Path | None) -> None:
    from torch import nn

    original = nn.Module.load_state_dict
    counter = _Counter(trap.networks + 1)

    def deadly(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if counter.hit():
            spring(victim)
        return original(self, *arguments, **options)

    nn.Module.load_state_dict = deadly


def _arm_steps(trap: AtStep, victim: Path | None) -> None:
    from torch.nn.modules.module import register_module_forward_pre_hook

    counter = _Counter(trap.nth)

    def deadly(module: Any, _: Any) -> None:
        if type(module).__name__ == "UNet" and counter.hit():
            spring(victim)

    register_module_forward_pre_hook(deadly)
