"""Everything in this process: for debugging, single pictures, and machines without Ray."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.executors.chunk_runner import ChunkRunner, ModelLoadError
from latentmill.jobs.executors.isolation import isolate_chunk
from latentmill.jobs.executors.unloadable import Unloadable
from latentmill.jobs.job import Job
from latentmill.jobs.spec import Runtime
from latentmill.jobs.worker import EngineFactory, load_engine

_FINISHING = 2


class InlineExecutor:
    """One model at a time in this process; pictures are checked and written by threads while the next are sampled.

    What raises is isolated; what kills the process cannot be, here: the same command on Ray can. Of several models, one
    that cannot be loaded costs its own samples: they fail with the reason, once another model has shown that models can
    be loaded here.
    """

    def __init__(self, job: Job, _: Runtime | None = None, *, engine_factory: EngineFactory = load_engine) -> None:
        self._job = job
        self._engine_factory = engine_factory
        self._runner: ChunkRunner | None = None
        self._model = -1
        self._unloadable = Unloadable(job)
        self._stopped = False
        self._suspects: set[int] = set()

    def run(self, chunks: Sequence[int], *, repair: bool = False) -> Iterator[ChunkResult]:
        """Run the chunks in order. Leaving the iterator in any way waits for the writes under way."""
        for model, of_model in groupby(chunks, self._job.plan.model_of):
            runner = self._load(model)
            if runner is None:
                self._unloadable.put(of_model)
                continue
            for result in self._stream(runner, of_model, repair=repair):
                if result.blame == "chunk":
                    self._suspects.add(result.chunk)
                else:
                    yield result
        while self._suspects and not self._stopped:
            chunk = min(self._suspects)
            self._suspects.remove(chunk)
            runner = self._load(self._job.plan.model_of(chunk))
            if runner is not None:
                yield isolate_chunk(self._job, runner, chunk, repair=repair, stopping=lambda: self._stopped)
        if not self._stopped:
            yield from self._unloadable.commit(repair=repair)

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

    def _load(self, model: int) -> ChunkRunner | None:
        """The runner of that model, which is loaded now unless it is the last one; None if it cannot be."""
        if model in self._unloadable.reasons or self._stopped:
            return None
        if self._runner is None or self._model != model:
            self._runner = None  # the old model goes before the new one comes: one of them may fill the memory
            gc.collect()
            try:
                self._runner = ChunkRunner(self._job, engine_factory=self._engine_factory, model=model)
            except ModelLoadError as error:
                self._unloadable.note_failed(model, str(error))
                return None
            self._model = model
            self._unloadable.note_loaded()
        return self._runner

    def _stream(self, runner: ChunkRunner, chunks: Iterable[int], *, repair: bool) -> Iterator[ChunkResult]:
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
