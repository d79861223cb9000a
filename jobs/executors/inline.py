"""Everything in this process: for debugging, single pictures, and machines without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.executors.chunk_runner import ChunkRunner
from latentmill.jobs.executors.isolation import isolate_chunk
from latentmill.jobs.job import Job
from latentmill.jobs.spec import Runtime
from latentmill.jobs.worker import EngineFactory, load_engine

_FINISHING = 2


class InlineExecutor:
    """One model in this process; pictures are checked and written by threads while the next chunk is sampled.

    What raises is isolated; what kills the process cannot be, here: the same command on Ray can.
    """

    def __init__(self, job: Job, _: Runtime | None = None, *, engine_factory: EngineFactory = load_engine) -> None:
        self._job = job
        self._engine_factory = engine_factory
        self._runner: ChunkRunner | None = None
        self._stopped = False
        self._suspects: set[int] = set()

    def run(self, chunks: Sequence[int], *, repair: bool = False) -> Iterator[ChunkResult]:
        """Run the chunks in order. Leaving the iterator in any way waits for the writes under way."""
        if self._runner is None:
            self._runner = ChunkRunner(self._job, engine_factory=self._engine_factory)
        for result in self._stream(self._runner, chunks, repair=repair):
            if result.blame == "chunk":
                self._suspects.add(result.chunk)
            else:
                yield result
        while self._suspects and not self._stopped:
            chunk = self._suspects.pop()
            yield isolate_chunk(self._job, self._runner, chunk, repair=repair, stopping=lambda: self._stopped)

    def stop(self) -> bool:
        """Finish the chunk that is being generated, and those being written."""
        self._stopped = True
        return self._runner is not None

    def describe(self) -> str:
        """Where the work runs."""
        return "inline (this process)"

    def live_actors(self) -> int:
        """One, once the model is loaded."""
        return int(self._runner is not None)

    def left_out(self) -> Sequence[str]:
        """Nothing: there is one process."""
        return ()

    def close(self) -> None:
        """Let go of the model."""
        self._runner = None

    def _stream(self, runner: ChunkRunner, chunks: Sequence[int], *, repair: bool) -> Iterator[ChunkResult]:
        in_flight: deque[Future[ChunkResult]] = deque()
        with ThreadPoolExecutor(_FINISHING, thread_name_prefix="finish") as pool:
            for chunk in chunks:
                if self._stopped:
                    break
                sampled = runner.sample(chunk, repair=repair)
                if isinstance(sampled, ChunkResult):
                    yield sampled
                else:
                    in_flight.append(pool.submit(runner.finish, sampled))
                while in_flight and (in_flight[0].done() or len(in_flight) > _FINISHING):
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
