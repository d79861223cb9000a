"""An engine without a model, for tests of the protocol: pixels follow from the request alone, and it is fast."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentmill.engine import GenerationRequest, GenerationResult, SafetyVerdict, queue_rows
from latentmill.jobs.plans.plan import Plan


@dataclass
class FakeEngine:
    """Prompts with `poison` fail, with `nsfw` are flagged; `crash` raises, `segfault` kills, `hang` holds the process.

    A `broken` one raises for everything, as on a lost device.
    """

    batch_size: int
    pause: float = 0.0
    checker: str = "fake"
    execution_class: str = "fake"
    generated: int = 0
    broken: bool = False

    def sample(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        """What `check` takes: results that need no more checking."""
        return self.generate(requests)

    def check(self, sampled: Sequence[Any]) -> list[GenerationResult]:
        """The verdicts are there already."""
        return list(sampled)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        if self.pause:
            print("begin", flush=True)
            time.sleep(self.pause)
        for request in requests:
            self._obey(request.prompt)
        self.generated += len(requests)
        queues = queue_rows([request.loop for request in requests], self.batch_size)
        slots = {row: slot for slot, queue in enumerate(queues) for row in queue}
        return [self._result(request, slots[row]) for row, request in enumerate(requests)]

    def _obey(self, prompt: str) -> None:
        if self.broken:
            raise RuntimeError("the device is lost")
        if "crash" in prompt:
            raise RuntimeError("this prompt raises")
        if "hungry" in prompt:
            raise MemoryError("CUDA out of memory: this prompt wants 80 GiB")
        if "segfault" in prompt:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in prompt:
            ctypes.PyDLL(None).sleep(3600)  # with Python's lock held: no thread of Python's runs meanwhile

    def _result(self, request: GenerationRequest, slot: int) -> GenerationResult:
        poison = "poison" in request.prompt
        flagged = "nsfw" in request.prompt
        verdict = SafetyVerdict(checker=self.checker, score=0.9 if flagged else 0.1, flagged=flagged)
        return GenerationResult(
            pixels=None if poison else fake_pixels(request),
            error="this prompt is poison" if poison else None,
            safety=None if poison else verdict,
            prompt_tokens=len(request.prompt.split()),
            precision="fp32",
            batch_size=self.batch_size,
            batch_slot=slot,
        )


def fake_pixels(request: GenerationRequest) -> np.ndarray:
    """A few soft blobs whose colours follow from the whole request."""
    # Old outputs of this engine are kept as files, and their requests had no LoRAs and no images.
    said = repr(request).replace(", loras=()", "").replace(", image=None, strength=None", "")
    seed = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8])
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3))
    rows = np.linspace(0, 3, request.height)
    columns = np.linspace(0, 3, request.width)
    r, c = np.floor(rows).astype(int).clip(0, 2), np.floor(columns).astype(int).clip(0, 2)
    y, x = (rows - r)[:, None, None], (columns - c)[None, :, None]
    top = coarse[r][:, c] * (1 - x) + coarse[r][:, c + 1] * x
    bottom = coarse[r + 1][:, c] * (1 - x) + coarse[r + 1][:, c + 1] * x
    return (top * (1 - y) + bottom * y).astype(np.uint8)


def fake_engine(plan: Plan, device: str) -> FakeEngine:
    """The engine factory of fast tests."""
    return FakeEngine(batch_size=plan.batch_size, checker="none" if plan.settings.safety == "none" else "fake")


def slow_engine(plan: Plan, device: str) -> FakeEngine:
    """The same pictures, a tenth of a second per chunk: long enough to be killed in the middle."""
    return FakeEngine(batch_size=plan.batch_size, pause=0.1)


def broken_engine(plan: Plan, device: str) -> FakeEngine:
    """A device that takes no work."""
    return FakeEngine(batch_size=plan.batch_size, broken=True)
