"""Everything in this process: for debugging, single pictures, and machines without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from engine import EngineError
from jobs.errors import JobError
from jobs.store.errors import StorageError
from jobs.worker import ChunkGenerator, EngineFactory, GeneratedChunk, Receipt, finish_chunk, load_engine

_FINISHERS = 2


class InlineExecutor:
    """One model in this process; pictures are written by threads while the next chunk is generated."""

    def __init__(self, *, device: str = "auto", engine_factory: EngineFactory = load_engine) -> None:
        self._device = device
        self._engine_factory = engine_factory
        self._generator: ChunkGenerator | None = None

    def run(self, out_url: str, chunks: Sequence[int]) -> Iterator[Receipt]:
        """Run the chunks in order. Leaving the iterator in any way waits for the writes under way."""
        if self._generator is None:
            try:
                self._generator = ChunkGenerator(out_url, device=self._device, engine_factory=self._engine_factory)
            except EngineError as error:
                raise JobError(str(error)) from error
        in_flight: deque[Future[Receipt]] = deque()
        with ThreadPoolExecutor(_FINISHERS, thread_name_prefix="finish") as pool:
            for chunk in chunks:
                generated = _generate(self._generator, chunk)
                if isinstance(generated, Receipt):
                    yield generated
                else:
                    in_flight.append(pool.submit(_finish, out_url, generated))
                while in_flight and (in_flight[0].done() or len(in_flight) > _FINISHERS):
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()

    def describe(self) -> str:
        """Where the work runs."""
        return "inline (this process)"

    def live_actors(self) -> int:
        """One, once the model is loaded."""
        return int(self._generator is not None)

    def close(self) -> None:
        """Let go of the model."""
        self._generator = None


def _generate(generator: ChunkGenerator, chunk: int) -> GeneratedChunk | Receipt:
    try:
        return generator.generate(chunk)
    except (StorageError, EngineError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError for its device
        text = str(error) or type(error).__name__
        return Receipt(chunk=chunk, outcome="error", error=text, actor=generator.actor)


def _finish(out_url: str, generated: GeneratedChunk) -> Receipt:
    try:
        return finish_chunk(out_url, generated)
    except StorageError as error:
        return Receipt(chunk=generated.chunk, outcome="error", error=str(error), actor=generated.actor)
