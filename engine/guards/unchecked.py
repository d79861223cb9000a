"""No check, by the caller's explicit choice."""

from __future__ import annotations

from latentmill.engine.types import Pixels, SafetyVerdict


class Unchecked:
    """Passes every picture; every verdict says that none was checked."""

    def check(self, pixels: Pixels) -> SafetyVerdict:  # noqa: ARG002 - the protocol's signature
        return SafetyVerdict(checker="none", score=None, flagged=False)


def load(*_: object) -> Unchecked:
    """As all checkers are loaded."""
    return Unchecked()
