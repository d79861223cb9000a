"""What is to be made: two plans of five samples, and the engine that draws them, or fails to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from latentmill.engine import GenerationRequest, GenerationResult, SafetyVerdict
from latentmill.jobs.plans.columns import columns_of, formats, own_fields
from latentmill.jobs.plans.grid import Grid, Piece
from latentmill.jobs.plans.planned import PlannedSample, fingerprint
from latentmill.jobs.plans.row_classes import LOOP_FIELDS, encode_class
from latentmill.jobs.spec import JobSpec
from tests.simulator.world import URL

COLUMNS = (
    "sample_id",
    "row_id",
    "prompt",
    "negative_prompt",
    "seed",
    "status",
    "error",
    "image",
    "bytes",
    "sha256",
    "pixel_sha256",
    "execution_class",
)
CHUNKS = ((0, 2), (4,), (1, 3))
"""Ordinals by chunk: the first two chunks are one group, the third is another, so that publishing has to merge."""


class SimulatedPlan:
    """What the protocol asks of a plan: five samples in three chunks; `first_seed` tells two plans apart."""

    n_rows = n_samples = 5
    n_rejected = 0
    format_version = formats()[-1]
    columns = columns_of(format_version)
    file_metadata: Mapping[str, str] = {}
    n_chunks = len(CHUNKS)
    batch_size = 2
    grid = Grid(
        dimensions=(),
        classes=tuple(encode_class(LOOP_FIELDS, (side, side, 1, "ddim", 0)) for side in (8, 16)),
        images=np.array([[3, 2]]),
        chunk_size=2,
    )
    """Of chunks of the same sizes, by which the time that is left is reckoned."""
    settings = JobSpec(prompts=(), device="cpu", chunk_size=2, batch_size=2, watermark="none", watermark_text="")
    model = SimpleNamespace(name="simulated", weights_digest="0" * 64, fault=None)
    models = (model,)
    versions: Mapping[str, str] = {"latentmill": "0"}
    record_schema = pa.schema([entry for entry in own_fields() if entry.name in COLUMNS])

    def __init__(self, first_seed: int, poisoned: frozenset[int]) -> None:
        self.first_seed = first_seed
        self.poisoned = poisoned
        """Ordinals that fail when their chunk is made; a repair may heal them."""
        parameters = {"seed": first_seed}
        self.identity = {"model_files": {}, "parameters": parameters, "axes": [], "manifest": "0" * 64}
        self.identity["threads_per_actor"] = 1
        self.plan_hash = fingerprint(self.identity)
        self.rejected = f"the rejected rows of plan {first_seed}".encode()

    def model_of(self, _chunk: int) -> int:
        return 0

    def of_model(self, _number: int) -> SimulatedPlan:
        return self

    def constants_of(self, _model: int) -> Mapping[str, Any]:
        return {}

    def pieces_of_groups(self) -> list[Iterator[Piece]]:
        return [iter([Piece(0, slice(2)), Piece(1, slice(1))]), iter([Piece(2, slice(2))])]

    def groups_in(self, _chunk: int) -> int:
        return 1

    def samples_of_chunk(self, chunk: int) -> list[PlannedSample]:
        return [self._sample(ordinal) for ordinal in CHUNKS[chunk]]

    def samples_in_chunks(self, chosen: Any) -> int:
        return sum(len(CHUNKS[chunk]) for chunk in np.flatnonzero(chosen))

    def _sample(self, ordinal: int) -> PlannedSample:
        request = GenerationRequest(
            prompt="simulated",
            negative_prompt="",
            seed=self.first_seed + ordinal,
            width=8,
            height=8,
            num_inference_steps=1,
            guidance_scale=1.0,
            sampler="ddim",
            eta=0.0,
        )
        sample_id = f"{ordinal:08d}"
        return PlannedSample(
            ordinal=ordinal, sample_id=sample_id, row_number=ordinal, row_id=sample_id, request=request, extra={}
        )


PLANS = (SimulatedPlan(100, frozenset({0, 1, 3})), SimulatedPlan(200, frozenset()))
"""One with samples that fail (half a chunk, and a whole one), one without."""
PLAN_BY_HASH = {plan.plan_hash: plan for plan in PLANS}


class SimulatedEngine:
    """Pictures that follow from the seed alone; ordinal 2 is flagged, the plan's poisoned ones fail unless healed."""

    execution_class = "simulated"

    def __init__(self, plan: SimulatedPlan, heals: Callable[[int], bool]) -> None:
        self._plan = plan
        self._heals = heals

    def sample(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        return self.generate(requests)

    def check(self, sampled: Sequence[Any]) -> list[GenerationResult]:
        return list(sampled)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        return [self._result(request.seed - self._plan.first_seed) for request in requests]

    def _result(self, ordinal: int) -> GenerationResult:
        return result_of(self._plan, ordinal, failed=ordinal in self._plan.poisoned and not self._heals(ordinal))


@cache
def result_of(plan_: SimulatedPlan, ordinal: int, *, failed: bool) -> GenerationResult:
    flagged = ordinal == 2
    verdict = SafetyVerdict(checker="simulated", score=0.9 if flagged else 0.1, flagged=flagged)
    return GenerationResult(
        pixels=None if failed else np.full((8, 8, 3), plan_.first_seed % 251 + ordinal, np.uint8),
        error="poison" if failed else None,
        safety=None if failed else verdict,
        prompt_tokens=1,
        precision="fp32",
        batch_size=2,
        batch_slot=0,
    )


class Draft:
    """What `adopt` asks of a draft."""

    def __init__(self, plan: SimulatedPlan) -> None:
        self.identity = plan.identity
        self.notes: tuple[str, ...] = ()
        self.digest = str(plan.first_seed).ljust(64, "0")
        self.spec = SimpleNamespace(threads_per_actor=1, out=URL)
        self.snapshot = SimpleNamespace(parts=(0,), path=lambda _: _Bytes(b"the snapshot of a manifest"))
        self.rejects = SimpleNamespace(path=_Bytes(plan.rejected))
        self.wildcards = None
        self.notes = ()
        self._hash = plan.plan_hash

    def document(self) -> dict[str, Any]:
        return {"plan_hash": self._hash}


@dataclass(frozen=True)
class _Bytes:
    data: bytes

    def read_bytes(self) -> bytes:
        return self.data
