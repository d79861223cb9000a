"""The fake engine of the soak: where its calls are counted, each takes half a second and leaves a byte in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.plans.plan import Plan
from tests.jobs.fakes import FakeEngine

CALLS = "LATENTMILL_SOAK_CALLS"
"""The variable that names the file."""


@dataclass
class CountedEngine(FakeEngine):
    """Its pictures are the fake engine's."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        if path := os.environ.get(CALLS):
            with Path(path).open("ab", buffering=0) as calls:
                calls.write(b".")
            time.sleep(0.5)
        return super().generate(requests)


def counted_engine(plan: Plan, device: str) -> CountedEngine:
    """The engine factory."""
    return CountedEngine(batch_size=plan.batch_size, checker="none" if plan.settings.safety == "none" else "fake")


def calls(path: Path) -> int:
    """How many chunks were generated so far, by whomever."""
    return path.stat().st_size if path.exists() else 0
