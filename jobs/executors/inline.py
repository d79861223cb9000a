"""Everything in this process: for debugging, single pictures, and machines without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from latentmill.engine import EngineError
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.isolation import TroubleError, isolate_chunk
from latentmill.jobs.finishing import FinishedSample
from latentmill.jobs.job import open_job
from latentmill.jobs.worker import (
    ChunkGenerator,
    EngineFactory,
    GeneratedChunk,
    Receipt,
    commit_chunk,
    describe_fault,
    fault_receipt,
    finish_chunk,
    load_engine,
)

_FINISHERS = 2


class InlineExecutor:
    """One model in this process; pictures are written by threads while the next chunk is generated.

    What raises is isolated; what kills the process cannot be, here: the same command on Ray can.
    """

    def __init__(self, *, device: str = "auto", engine_factory: EngineFactory = load_engine) -> None:
        self._device = device
        self._engine_factory = engine_factory
        self._generator: ChunkGenerator | None = None
        self._stopped = False
        self._troubled: set[int] = set()

    def run(self, out_url: str, chunks: Sequence[int], *, repair: bool = False) -> Iterator[Receipt]:
        """Run the chunks in order. Leaving the iterator in any way waits for the writes under way."""
        generator = self._loaded(out_url)
        for receipt in self._stream(generator, out_url, chunks, repair=repair):
            if receipt.blame == "chunk":
                self._troubled.add(receipt.chunk)
            else:
                yield receipt
        cell = _InlineCell(generator, out_url, repair=repair)
        while self._troubled and not self._stopped:
            chunk = self._troubled.pop()
            yield isolate_chunk(open_job(out_url), cell, chunk, repair=repair, stopping=lambda: self._stopped)

    def stop(self) -> bool:
        """Finish the chunk that is being generated, and those being written."""
        self._stopped = True
        return self._generator is not None

    def describe(self) -> str:
        """Where the work runs."""
        return "inline (this process)"

    def live_actors(self) -> int:
        """One, once the model is loaded."""
        return int(self._generator is not None)

    def left_out(self) -> Sequence[str]:
        """Nothing: there is one process."""
        return ()

    def close(self) -> None:
        """Let go of the model."""
        self._generator = None

    def _loaded(self, out_url: str) -> ChunkGenerator:
        if self._generator is None:
            try:
                self._generator = ChunkGenerator(out_url, device=self._device, engine_factory=self._engine_factory)
            except EngineError as error:
                raise JobError(str(error)) from error
        return self._generator

    def _stream(
        self, generator: ChunkGenerator, out_url: str, chunks: Sequence[int], *, repair: bool
    ) -> Iterator[Receipt]:
        in_flight: deque[Future[Receipt]] = deque()
        with ThreadPoolExecutor(_FINISHERS, thread_name_prefix="finish") as pool:
            for chunk in chunks:
                if self._stopped:
                    break
                generated = _generate(generator, chunk, repair=repair)
                if isinstance(generated, Receipt):
                    yield generated
                else:
                    in_flight.append(pool.submit(_finish, out_url, generated))
                while in_flight and (in_flight[0].done() or len(in_flight) > _FINISHERS):
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()


class _InlineCell:
    """A `Cell` of isolation.py in this process."""

    def __init__(self, generator: ChunkGenerator, out_url: str, *, repair: bool) -> None:
        self._generator = generator
        self._out_url = out_url
        self._repair = repair

    @property
    def execution_class(self) -> str:
        return self._generator.execution_class

    def chunk(self, chunk: int) -> Receipt:
        generated = _generate(self._generator, chunk, repair=self._repair)
        receipt = generated if isinstance(generated, Receipt) else _finish(self._out_url, generated)
        if receipt.blame == "chunk":
            raise TroubleError(receipt.error)
        return receipt

    def row(self, chunk: int, row: int) -> FinishedSample:
        with _as_trouble():
            return self._generator.finish_row(chunk, row)

    def control(self, chunk: int) -> None:
        with _as_trouble():
            self._generator.generate_control(chunk)

    def commit(self, chunk: int, finished: Sequence[FinishedSample], repair: int) -> Receipt:
        try:
            return commit_chunk(
                self._out_url,
                chunk,
                finished,
                execution_class=self.execution_class,
                actor=self._generator.actor,
                generate_seconds=0.0,
                repair=repair,
            )
        except JobError as error:
            return fault_receipt(chunk, error, self._generator.actor)


@contextmanager
def _as_trouble() -> Iterator[None]:
    """Within, what the model or the device raises, of whatever kind, is told as trouble; a job's own errors go on."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        raise TroubleError(describe_fault(error)) from error


def _generate(generator: ChunkGenerator, chunk: int, *, repair: bool = False) -> GeneratedChunk | Receipt:
    try:
        return generator.generate(chunk, repair=repair)
    except Exception as error:  # noqa: BLE001 - the model's, the device's or the store's: the receipt says which
        return fault_receipt(chunk, error, generator.actor)


def _finish(out_url: str, generated: GeneratedChunk) -> Receipt:
    try:
        return finish_chunk(out_url, generated)
    except Exception as error:  # noqa: BLE001 - see above
        return fault_receipt(generated.chunk, error, generated.actor)
