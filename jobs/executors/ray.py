"""Chunks on a Ray cluster: a pool of workers, and one by itself for what breaks them. The ledger decides what is done.

Commit records are create-only and the runner plans `all - committed` again, so a chunk that is dropped or made twice
costs time and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from latentmill.jobs.chunk_result import ChunkResult, describe_fault
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.faults import Faults
from latentmill.jobs.executors.isolation import isolate_chunk
from latentmill.jobs.executors.pool import size_pool
from latentmill.jobs.executors.ray_cluster import connect
from latentmill.jobs.executors.ray_entry import send_by_value
from latentmill.jobs.executors.ray_head import watched_head
from latentmill.jobs.executors.ray_isolated import RayIsolatedWorker
from latentmill.jobs.executors.ray_metrics import ray_metrics
from latentmill.jobs.executors.ray_pool import RayPool
from latentmill.jobs.executors.unloadable import Unloadable
from latentmill.jobs.job import Job
from latentmill.jobs.spec import Runtime
from latentmill.jobs.store.urls import shared_url
from latentmill.jobs.worker import EngineFactory, load_engine


class RayExecutor:
    """Chunks on a Ray cluster: the one at `runtime.address` or RAY_ADDRESS, else one of its own on this machine.

    Chunks run pooled first. One that twice ended its worker, by a death, a missed deadline or an exception, is suspect
    and runs isolated when the others are done (isolation.py). A node where no model can be loaded is left out.
    """

    def __init__(self, job: Job, runtime: Runtime, *, engine_factory: EngineFactory = load_engine) -> None:
        self._job = job
        donors = tuple(shared_url(donor, here="inline") for donor in job.reuse.donors)
        place = (shared_url(job.url, here="inline"), job.plan.plan_hash, replace(job.reuse, donors=donors))
        self._arguments = pickle.dumps((place, engine_factory))
        self._threads = job.plan.settings.threads_per_actor or 1
        self._faults = Faults(runtime.chunk_timeout)
        self._unloadable = Unloadable(job)
        self._stopping = False
        self._isolating = False
        self._connection = connect(runtime.address, insecure=runtime.insecure_ray)
        send_by_value()
        try:
            self._size = size_pool(job.plan, runtime, self._connection.nodes(), growing=self._connection.joined)
        except BaseException:
            self._connection.close()
            raise
        self._metrics = ray_metrics(job, self._connection.nodes)
        self._pool = self._new_pool()

    def run(self, chunks: Sequence[int], *, repair: bool = False) -> Iterator[ChunkResult]:
        """Run the chunks, in any order. Closing the iterator cancels what is in flight: it stays open in the ledger.

        Raises JobError when no node is left that can load the model, or when Ray cannot go on.
        """
        pending = np.zeros(self._job.plan.n_chunks, dtype=np.bool_)
        pending[chunks] = True
        self._metrics.begin(self._job.plan.samples_in_chunks(pending), repair=repair)
        with closing(self._run(chunks, repair=repair)) as results:
            for result in results:
                self._metrics.add(result)
                yield result

    def _run(self, chunks: Sequence[int], *, repair: bool) -> Generator[ChunkResult]:
        done = False
        try:
            with _ray_errors(), watched_head(self._connection.head):
                yield from self._pool.run(chunks, repair=repair)
                isolated = [chunk for chunk in chunks if self._faults.is_suspect(chunk)]
                if isolated and not self._stopping:
                    yield from self._run_isolated(isolated, repair=repair)
                if not self._stopping:
                    yield from self._unloadable.commit(repair=repair)
            done = True
        finally:
            if not done:
                self._pool.close()

    def stop(self) -> bool:
        """Chunks that are begun are finished; no more are."""
        self._stopping = True
        self._pool.stop()
        return self._isolating or self._pool.in_flight > 0

    def describe(self) -> str:
        """Where the work runs."""
        kind = f"{self._size.gpus:g} GPU each" if self._size.gpus else f"CPU, {self._threads} thread(s) each"
        more = ", more as nodes join" if self._size.maximum > self._size.initial else ""
        return f"Ray ({self._connection.where}), {self._size.initial} actors{more}, {kind}"

    def live_actors(self) -> int:
        """Actors that are up with their model loaded."""
        return len(self._pool.ready)

    def left_out(self) -> Sequence[str]:
        """Nodes where no model can be loaded, or where everything failed."""
        return tuple(sorted(set(self._faults.unfit.values())))

    def close(self) -> None:
        """Disconnect, and end the cluster if it was started here; nobody else's cluster is ever stopped."""
        self._pool.close()
        self._metrics.end(self._faults.deaths)
        self._connection.close()

    def _new_pool(self) -> RayPool:
        return RayPool(
            self._job.plan,
            self._size,
            self._faults,
            self._unloadable,
            arguments=self._arguments,
            worker_options=self._worker_options,
            nodes=self._connection.nodes,
            growing=self._connection.joined,
            on_look=self._look,
        )

    def _look(self) -> None:
        self._metrics.look(
            workers=self._pool.ready,
            deaths=self._faults.deaths,
            queued=self._pool.queued,
            in_flight=self._pool.in_flight,
        )

    def _worker_options(self) -> dict[str, Any]:
        """What a process with a model asks of Ray."""
        unfit = ",".join(sorted(self._faults.unfit))
        fit_nodes = {"ray.io/node-id": f"!in({unfit})"} if unfit else {}
        return {
            "num_cpus": self._size.cpus,
            "num_gpus": self._size.gpus or None,
            "resources": dict(self._size.resources),
            "label_selector": {**self._size.label_selector, **fit_nodes},
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        }

    def _run_isolated(self, chunks: Sequence[int], *, repair: bool) -> Iterator[ChunkResult]:
        """One chunk after the other in a process of its own, with nothing else of the job at work."""

        def seconds(chunk: int) -> float:
            return self._faults.deadline(*self._job.plan.grid.pace_of(chunk))

        self._pool.close()
        self._pool = self._new_pool()
        worker = RayIsolatedWorker(
            self._arguments,
            options=self._worker_options(),
            seconds=seconds,
            model_of=self._job.plan.model_of,
            on_death=self._faults.note_death,
        )
        self._isolating = True
        try:
            for number, chunk in enumerate(chunks):
                if self._stopping:
                    return
                self._metrics.look(workers=(), deaths=self._faults.deaths, queued=len(chunks) - number - 1, in_flight=1)
                yield isolate_chunk(self._job, worker, chunk, repair=repair, stopping=lambda: self._stopping)
        finally:
            self._isolating = False
            worker.close()


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Within, what Ray itself raises means that the cluster cannot go on: a JobError."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray gave up: {describe_fault(error)}; run the same command again: it resumes") from error
