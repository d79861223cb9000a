"""Repairs made by the real worker, with an engine that can be told which prompts it is past failing on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.job import open_job
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.worker import ChunkGenerator, EngineFactory, GeneratedChunk, postprocess_chunk
from tests.jobs.fakes import FakeEngine


@dataclass
class HealedEngine(FakeEngine):
    """The fake engine on a day when prompts with one of these words do not fail."""

    healed: Collection[str] = ("poison",)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        return super().generate([self._without_poison(request) for request in requests])

    def _without_poison(self, request: GenerationRequest) -> GenerationRequest:
        if any(word in request.prompt for word in self.healed):
            return replace(request, prompt=request.prompt.replace("poison", "cured"))
        return request


def healed_engine(plan: Plan, device: str, healed: Collection[str] = ("poison",)) -> HealedEngine:
    return HealedEngine(batch_size=plan.batch_size, healed=healed)


def start_repair(out: str, chunk: int, engine: EngineFactory = healed_engine) -> GeneratedChunk:
    """What failed in a chunk, made again and not yet written."""
    generated = ChunkGenerator(open_job(out), engine_factory=engine).generate(chunk, repair=True)
    assert isinstance(generated, GeneratedChunk)
    return generated


def repair(out: str, chunk: int, engine: EngineFactory = healed_engine) -> ChunkResult:
    """One try to repair a chunk."""
    return postprocess_chunk(open_job(out), start_repair(out, chunk, engine))


def partly_healed_engine(plan: Plan, device: str) -> HealedEngine:
    return healed_engine(plan, device, healed=("four", "five"))
