"""What may befall a request on its way to a store, and rules that choose whom it befalls.

A fault is a word, with its argument after a space:

`503 SlowDown` and the like   that answer; the store never hears of the request
`deny 503 SlowDown`           that answer, although the store has done what it was asked
`drop`                        the store has done it, and the connection is reset instead of an answer
`reset`                       the connection is reset before the store hears of it
`delay SECONDS`               the request waits so long first
`stall`                       nothing is ever answered
`truncate`                    the body of the answer ends half-way
`twice` `twice 1`             the store gets it twice; its second (or first) answer comes back
`plain`                       the create-only header is taken out
`kill half`                   half of its body reaches the store, then the proxy's victim dies
`kill unanswered`             the store has done it, then the proxy's victim dies without its answer
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Rule = Callable[[str, str], str | None]
"""From a request's method and target to what befalls it; None for nothing."""

_ERRORS = ("500 InternalError", "503 SlowDown", "503 ServiceUnavailable")


def never(_method: str, _target: str) -> None:
    """Nothing befalls anybody."""


def once(kind: str, *, method: str, target: str = "", after: int = 0) -> Rule:
    """Do it to the first such request after so many; `target` is a part of its path and query."""
    seen = iter(range(10**9))

    def rule(its_method: str, its_target: str) -> str | None:
        return kind if its_method == method and target in its_target and next(seen) == after else None

    return rule


def always(kind: str, *, method: str = "", target: str = "") -> Rule:
    """Do it to every such request."""
    return lambda its_method, its_target: kind if method in its_method and target in its_target else None


@dataclass(frozen=True)
class AtRequest:
    """A place to die: the nth PUT of a path that contains `part`."""

    when: Literal["half", "unanswered"]
    part: str
    nth: int = 1

    @property
    def rule(self) -> Rule:
        return once(f"kill {self.when}", method="PUT", target=self.part, after=self.nth - 1)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Bad weather: how often each fault happens, as a share of all requests (of GETs, of PUTs, where that is said)."""

    refuse: float = 0.10
    """A 5xx answer, and the store never heard of the request."""
    deny: float = 0.10
    drop: float = 0.05
    reset: float = 0.02
    delay: float = 0.01
    delay_seconds: float = 3.0
    freeze: float = 0.0
    """It waits for 60 s, at which clients give up."""
    truncate: float = 0.03
    """Of GETs."""
    twice: float = 0.03
    """Of PUTs; either answer comes back."""

    def rule(self, seed: int) -> Rule:
        """The choices follow from the seed and the order of the requests."""
        chance = random.Random(seed)
        lock = threading.Lock()
        kinds = ("refuse", "deny", "drop", "reset", "delay", "freeze", "truncate", "twice")
        only = {"truncate": "GET", "twice": "PUT"}

        def rule(method: str, _target: str) -> str | None:
            with lock:
                draw = chance.random()
                for kind in kinds:
                    if only.get(kind, method) != method:
                        continue
                    draw -= getattr(self, kind)
                    if draw < 0:
                        return self._words(kind, chance)
            return None

        return rule

    def _words(self, kind: str, chance: random.Random) -> str:
        if kind == "refuse":
            return chance.choice(_ERRORS)
        if kind == "deny":
            return f"deny {chance.choice(_ERRORS)}"
        if kind == "delay":
            return f"delay {chance.uniform(0.5, self.delay_seconds):.2f}"
        if kind == "freeze":
            return "delay 60"
        return f"twice {chance.choice([1, 2])}" if kind == "twice" else kind
