"""One thread of many actors: a scheduler, a clock and a store, all moved by one seeded random generator.

An actor is a greenlet that runs real protocol code. It hands the baton back at every call of the store, before and
often after the call takes effect; there it may be delayed, frozen for days (a zombie), or die.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet

from latentmill.jobs.store.storage import Storage

URL = "memory://simulated"
STEP_SECONDS = 0.04
"""The longest that one step takes: retries pause for many steps of the others."""
MOST_STEPS = 50_000


class Killed(BaseException):
    """SIGKILL: what dies of it makes no further call of the store."""


class Violation(AssertionError):  # noqa: N818 - it names what a schedule found, no fault of the code that raises it
    """An invariant that does not hold."""


class OutageError(ConnectionError):
    """A transient fault, before or after the call took effect: the caller cannot know."""


@dataclass(frozen=True)
class Weather:
    """How bad one schedule is: chances per call of the store, or per step of an actor."""

    fault: float
    refusal: float
    kill: float
    freeze: float


class Actor:
    """A greenlet with a fate. `given_up`: whoever waits for it has stopped to, and a zombie may still come back."""

    def __init__(self, world: World, name: str, body: Callable[[], None], *, mortal: bool) -> None:
        self.name = name
        self.mortal = mortal
        self.wakes_at = world.now
        self.given_up = False
        self.dead = False
        self.on_loss: Callable[[], None] | None = None
        self.greenlet = greenlet.greenlet(lambda: self._run(body), parent=world.hub)

    @property
    def over(self) -> bool:
        return self.greenlet.dead or (self.dead and not self.greenlet)  # or killed before it began

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Killed:
            self.dead = True


class World:
    """The scheduler and its clock."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.random = random.Random(seed)
        self.weather = weather
        self.now = 1_000_000.0
        self.hub = greenlet.getcurrent()
        self.actors: list[Actor] = []
        self.store = Store(self)
        self.trace: list[str] = []
        self.kills = self.faults = self.freezes = self.steps = 0
        self.broken: str | None = None
        self._current: Actor | None = None

    def spawn(self, name: str, body: Callable[[], None], *, after: float = 0.0, mortal: bool = True) -> Actor:
        """A new actor, which begins `after` so many seconds."""
        actor = Actor(self, name, body, mortal=mortal)
        actor.wakes_at += after
        self.actors.append(actor)
        return actor

    def run(self) -> None:
        """Until every actor has ended. An actor's exception that is not its death ends the schedule."""
        while self.actors:
            awake = [actor for actor in self.actors if actor.wakes_at <= self.now]
            if not awake:
                self.now = min(actor.wakes_at for actor in self.actors)
                continue
            actor = self.random.choice(awake)
            if actor.mortal and self._fate(actor):
                continue
            self._switch(actor)
            self.steps += 1
            self.now += self.random.random() * STEP_SECONDS
            if self.steps > MOST_STEPS:
                self.report("liveness: the schedule does not end")
            if self.broken is not None:
                raise Violation(self.broken)

    def report(self, problem: str) -> None:
        """An invariant is broken; the schedule ends at once, whatever the code that noticed makes of it."""
        self.note(self.current, f"BREAKS {problem}")
        self.broken = self.broken or problem

    def stop(self) -> None:
        """End every actor that is left."""
        for actor in list(self.actors):
            actor.on_loss = None
            self.kill(actor)

    def kill(self, actor: Actor) -> None:
        """The actor ends where it stands."""
        self.note(actor, "is killed")
        self.kills += 1
        actor.dead = True
        self._switch(actor, Killed)
        if actor.on_loss is not None:
            actor.on_loss()

    def freeze(self, actor: Actor) -> None:
        """The actor stops for up to two days; nobody waits for it."""
        actor.given_up = True
        actor.wakes_at = self.now + 10 ** self.random.uniform(0, 5.2)
        self.freezes += 1
        self.note(actor, f"is frozen until {actor.wakes_at:.1f}")
        if actor.on_loss is not None and self.random.random() < 0.5:
            actor.on_loss()  # its supervisor takes it for dead

    def pause(self, seconds: float = 0.0) -> None:
        """Hand the baton back; called by the actor whose turn it is. Outside a schedule it does nothing."""
        actor = self._current
        if actor is None:
            return
        if actor.dead:
            raise Killed  # its `finally` clauses must not reach the store: a process that dies has none
        actor.wakes_at = max(actor.wakes_at, self.now + seconds)
        self.hub.switch()

    def note(self, actor: Actor | None, text: str) -> None:
        self.trace.append(f"{self.now:.3f} {actor.name if actor else 'nobody'} {text}")

    @property
    def current(self) -> Actor | None:
        return self._current

    def _fate(self, actor: Actor) -> bool:
        chance = self.random.random()
        if chance < self.weather.kill:
            self.kill(actor)
            return True
        if chance < self.weather.kill + self.weather.freeze:
            self.freeze(actor)
            return True
        return False

    def _switch(self, actor: Actor, fate: type[Killed] | None = None) -> None:
        self._current = actor
        try:
            if fate is None:
                actor.greenlet.switch()
            elif actor.greenlet:
                actor.greenlet.throw(fate)
        finally:
            self._current = None
        if actor.over and actor in self.actors:
            self.actors.remove(actor)


class SerialPool:
    """A thread pool's stand-in: tasks run at once, one by one; a mapped batch in an order of the world's choice."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> SerialPool:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Done:
        try:
            return Done(call(*arguments), None)
        except Exception as error:  # noqa: BLE001 - a future keeps whatever its task raised
            return Done(None, error)

    def map(self, call: Callable[..., Any], *columns: Any) -> Iterator[Any]:
        rows = list(zip(*columns, strict=False))
        order = list(range(len(rows)))
        self._world.random.shuffle(order)
        results = {number: call(*rows[number]) for number in order}
        return iter([results[number] for number in range(len(rows))])


@dataclass(frozen=True)
class Done:
    """A finished future."""

    value: Any
    error: Exception | None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class Store:
    """Objects in memory. Every change is shown to the watchers before anyone can act on it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, float] = {}
        self.watchers: list[Callable[[str, bytes | None, bytes | None], None]] = []

    def change(self, path: str, data: bytes | None) -> None:
        """Put the object, or delete it (None)."""
        before = self.objects.pop(path, None)
        if data is not None:
            self.objects[path] = data
            self.times[path] = self._world.now
        for watcher in self.watchers:
            try:
                watcher(path, before, data)
            except Exception as error:  # noqa: BLE001 - the code under test would retry it as the store's own fault
                self._world.report(f"the watch failed over {path}: {error!r}")


class SimulatedStorage(Storage):
    """The real Storage, retries and all, in front of the simulated store."""

    def __init__(self, world: World) -> None:
        self._raw_url = self.url = URL
        self.single_writer = False
        self._backend = Backend(world)


class Backend:
    """What the store answers, if it answers."""

    def __init__(self, world: World) -> None:
        self._world = world

    def read(self, path: str, limit: int) -> bytes:
        return self._call("read", path, lambda: self._there(path))

    def write(self, path: str, data: bytes) -> None:
        self._call("write", path, lambda: self._world.store.change(path, data))

    def create(self, path: str, data: bytes) -> bool:
        def put_if_absent() -> bool:
            if path in self._world.store.objects:
                return False
            self._world.store.change(path, data)
            return True

        return bool(self._call("create", path, put_if_absent))

    def size(self, path: str) -> int:
        return len(self._call("size", path, lambda: self._there(path)))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return iter(self._call("list", prefix, lambda: self._names(prefix, hidden=False)))

    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]:
        return iter(self._call("list hidden", prefix, lambda: self._names(prefix, hidden=True)))

    def modified(self, path: str) -> float:
        def look_up() -> float:
            self._there(path)
            return self._world.store.times[path]

        return float(self._call("look up", path, look_up))

    def delete(self, path: str) -> None:
        def remove() -> None:
            if path in self._world.store.objects:
                self._world.store.change(path, None)

        self._call("delete", path, remove)

    def _call(self, verb: str, path: str, effect: Callable[[], Any]) -> Any:
        world = self._world
        world.pause()
        chance, weather = world.random.random(), world.weather
        if chance < weather.fault / 2:
            world.faults += 1
            world.note(world.current, f"{verb} {path}: fails before its effect")
            raise OutageError("the request was lost")
        if verb == "create" and chance > 1 - weather.refusal:
            world.faults += 1
            world.note(world.current, f"{verb} {path}: refused, whatever is there")
            return False
        try:
            answer = effect()
        except FileNotFoundError:
            world.note(world.current, f"{verb} {path}: no such object")
            raise
        if chance < weather.fault:
            world.faults += 1
            world.note(world.current, f"{verb} {path}: done, the answer is lost")
            raise OutageError("the answer was lost")
        world.note(world.current, f"{verb} {path}: {_shown(answer)}")
        if world.random.random() < 0.5:
            world.pause()  # the answer is under way
        return answer

    def _there(self, path: str) -> bytes:
        data = self._world.store.objects.get(path)
        if data is None:
            raise FileNotFoundError(path)
        return data

    def _names(self, prefix: str, *, hidden: bool) -> list[tuple[str, int]]:
        objects = self._world.store.objects
        found = (path for path in objects if not prefix or path.startswith(f"{prefix.strip('/')}/"))
        return [(path, len(objects[path])) for path in sorted(found) if ("/." in f"/{path}") == hidden]


def _shown(answer: Any) -> str:
    if isinstance(answer, bytes):
        return f"{len(answer)} bytes"
    return f"{len(answer)} names" if isinstance(answer, list) else str(answer)


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
