"""Engine factories that a benchmark puts in the place of the model, in a driver of its own.

Each notes what it makes in the file BENCH_TRACE, as the peers do: `generated PID PICTURES BEGAN ENDED`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.synthetic import instant_engine
from latentmill.engine import GenerationRequest, GenerationResult, UncheckedResult
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.worker import ChunkEngine, load_engine

if TYPE_CHECKING:  # importing it takes as long as importing torch, which the command's own driver does not do either
    from latentmill.engine.guards.safety import SafetyChecker


def traced_engine(plan: Plan, device: str) -> ChunkEngine:
    """The plan's own model."""
    return Traced(load_engine(plan, device))


class Traced:
    """An engine whose work is noted."""

    def __init__(self, engine: ChunkEngine) -> None:
        self._engine = engine

    @property
    def execution_class(self) -> str:
        return self._engine.execution_class

    def sample(self, requests: Sequence[GenerationRequest]) -> list[UncheckedResult]:
        """As the engine does."""
        began = time.time()
        sampled = self._engine.sample(requests)
        trace(len(requests), began)
        return sampled

    def check(self, sampled: Sequence[UncheckedResult]) -> list[GenerationResult]:
        """As the engine does."""
        return self._engine.check(sampled)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Both."""
        return self.check(self.sample(requests))


class StandIn:
    """An accelerator that is not there: a batch takes BENCH_SECONDS without CPU and gives pictures that are known.

    The checker is the plan's own, and judges picture by picture.
    """

    def __init__(self, plan: Plan) -> None:
        self._seconds = float(os.environ["BENCH_SECONDS"])
        self._pictures = np.load(os.environ["BENCH_PICTURES"], mmap_mode="r")
        self._batch_size = plan.batch_size
        self._checker = _checker(plan)
        self.execution_class = "stand-in"

    def sample(self, requests: Sequence[GenerationRequest]) -> list[UncheckedResult]:
        """Batch by batch."""
        sampled: list[UncheckedResult] = []
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            began = time.time()
            time.sleep(self._seconds)
            trace(len(batch), began)
            sampled += [self._picture(request, slot) for slot, request in enumerate(batch)]
        return sampled

    def check(self, sampled: Sequence[UncheckedResult]) -> list[GenerationResult]:
        """As the engine does."""
        from latentmill.engine.guards.safety import judge

        return [judge(self._checker, result) for result in sampled]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Both."""
        return self.check(self.sample(requests))

    def _picture(self, request: GenerationRequest, slot: int) -> UncheckedResult:
        pixels = np.array(self._pictures[request.seed % len(self._pictures)])
        return UncheckedResult(
            judged=pixels,
            kept=pixels,
            error=None,
            prompt_tokens=12,
            precision="fp16",
            batch_size=self._batch_size,
            batch_slot=slot,
        )


def _checker(plan: Plan) -> SafetyChecker:
    if plan.settings.safety == "none":
        from latentmill.engine.guards.unchecked import Unchecked

        return Unchecked()
    from latentmill.engine.guards.open_nsfw import OpenNsfw

    return OpenNsfw(plan.settings.nsfw_threshold, 1)


def standin_engine(plan: Plan, device: str) -> StandIn:  # noqa: ARG001 - the shape of an engine factory
    """A stand-in of the plan's batch size. The model is loaded as ever, and left alone."""
    load_engine(plan, "cpu")
    return StandIn(plan)


def quick_engine(plan: Plan, device: str) -> Traced:
    """An engine of no cost."""
    return Traced(instant_engine(plan, device))


def trace(pictures: int, began: float) -> None:
    """One line in the file that the benchmark named, if it did."""
    place = os.environ.get("BENCH_TRACE")
    if place:
        with Path(place).open("a") as log:
            log.write(f"generated {os.getpid()} {pictures} {began:.4f} {time.time():.4f}\n")


def use(factory: str) -> None:
    """Run `latentmill`'s command line with another engine: `python -m bench.own_engines FACTORY run ...`."""
    import sys

    from bench import own_engines  # by its own name, so that workers find it by import
    from latentmill.cli import main
    from latentmill.jobs.runner import run_job

    assert run_job.__kwdefaults__ is not None
    run_job.__kwdefaults__["engine_factory"] = getattr(own_engines, factory)  # no flag says it, and none should
    sys.argv = ["latentmill", *sys.argv[2:]]
    main()


if __name__ == "__main__":
    import sys

    use(sys.argv[1])
