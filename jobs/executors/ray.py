"""Ray Data over chunk numbers: actors generate, CPU tasks postprocess and commit, and the ledger decides what is done.

Ray gives pool scaling, backpressure and the replacement of dead actors and nodes. It may drop a chunk or run one
twice; commit records are create-only and the runner plans `all - committed` again, so neither matters.
"""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa

from latentmill.jobs.chunk_result import ChunkResult, describe_fault
from latentmill.jobs.code import own_code
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.isolation import isolate_chunk
from latentmill.jobs.executors.pool import size_pool
from latentmill.jobs.executors.ray_cluster import connect
from latentmill.jobs.executors.ray_entry import Generate, postprocess, send_by_value
from latentmill.jobs.executors.ray_isolated import RayIsolatedWorker
from latentmill.jobs.executors.ray_watch import Watch, open_registry
from latentmill.jobs.job import Job
from latentmill.jobs.spec import Runtime
from latentmill.jobs.store.urls import allowed_filesystem, display_url
from latentmill.jobs.worker import EngineFactory, load_engine

HOPELESS = 8
"""Errors in a row after which a pass ends, beside two for each actor."""

SINGLE_BLOCKS = 20_000
"""Up to so many chunks, each is a block of its own, which spreads best; beyond, blocks of eight cost less."""

SEGMENT_BLOCKS = 2_000
"""Blocks of one dataset: the driver's memory stays small however many chunks there are."""


class RayExecutor:
    """Chunks on a Ray cluster: the one at `runtime.address` or RAY_ADDRESS, else one of its own on this machine.

    Chunks run pooled first. One that twice ended its worker, by a death, a missed deadline or an exception, is suspect
    and runs isolated when the others are done (isolation.py). A node where no model can be loaded is left out.
    """

    def __init__(self, job: Job, runtime: Runtime, *, engine_factory: EngineFactory = load_engine) -> None:
        self._engine_factory = engine_factory
        self._job = job
        self._place = (_shared_url(job.url), job.plan.plan_hash)
        self._threads = job.plan.settings.threads_per_actor or 1
        self._connection = connect(runtime.address, insecure=runtime.insecure_ray)
        send_by_value()
        try:
            self._pool = size_pool(job.plan, runtime, self._connection.nodes(), growing=self._connection.joined)
            with _ray_errors():
                self._registry = open_registry(runtime.chunk_timeout)
        except BaseException:
            self._connection.close()
            raise
        self._watch = Watch(self._registry, self._connection.head)
        self._unfit: dict[str, str] = {}
        self._stopping = threading.Event()
        self._isolating = False

    def run(self, chunks: Sequence[int], *, repair: bool = False) -> Iterator[ChunkResult]:
        """Run the chunks, in any order. Closing the iterator cancels what is in flight: it stays open in the ledger.

        Raises JobError when no node is left that can load the model, or when Ray cannot go on.
        """
        if not chunks:
            return
        with _ray_errors():
            suspects = self._suspects()
            pooled = [chunk for chunk in chunks if chunk not in suspects]
            size = 1 if len(pooled) <= SINGLE_BLOCKS else 8
            for start in range(0, len(pooled), size * SEGMENT_BLOCKS):
                segment = pooled[start : start + size * SEGMENT_BLOCKS]
                if not self._stopping.is_set():
                    yield from self._run_pooled(segment, size, repair=repair)
                suspects = self._suspects()
            isolated = [chunk for chunk in chunks if chunk in suspects]
            if isolated and not self._stopping.is_set():
                yield from self._run_isolated(isolated, repair=repair)

    def stop(self) -> bool:
        """The watch tells the registry, and the registry the workers."""
        self._stopping.set()
        return self._isolating or self._watch.overview.begun > 0

    def describe(self) -> str:
        """Where the work runs."""
        kind = f"{self._pool.gpus:g} GPU each" if self._pool.gpus else f"CPU, {self._threads} thread(s) each"
        more = ", more as nodes join" if self._pool.maximum > self._pool.initial else ""
        return f"Ray ({self._connection.where}), {self._pool.initial} actors{more}, {kind}"

    def live_actors(self) -> int:
        """Actors that are up with their model loaded, as of a second ago."""
        return self._watch.overview.ready

    def left_out(self) -> Sequence[str]:
        """Nodes where no model can be loaded, or where everything failed."""
        return tuple(sorted(set(self._unfit.values())))

    def close(self) -> None:
        """Disconnect, and end the cluster if it was started here; nobody else's cluster is ever stopped."""
        import ray

        ray.kill(self._registry)
        self._connection.close()

    def _run_pooled(self, chunks: Sequence[int], block_size: int, *, repair: bool) -> Iterator[ChunkResult]:
        import ray

        ray.get(self._registry.start_pass.remote())
        blocks = _blocks(chunks, block_size)
        seen: set[int] = set()
        failures = 0
        with (
            self._watch.over(self._stopping, self._unfit) as watch,
            closing(_results(self._dataset(blocks, repair=repair))) as results,
        ):
            for result in results:
                seen.add(result.chunk)
                if result.outcome != "skipped":
                    yield result
                if watch.under_way is not None and seen.issuperset(watch.under_way):
                    break  # stopped, and what was in flight is done
                failures = 0 if result.done else failures + (result.outcome == "error")
                if failures >= HOPELESS + 2 * self._pool.initial:
                    break  # with every chunk failing, the runner should hear of it now
            else:
                self._note_vanished(seen)
        self._leave_out(watch.overview.unfit)

    def _dataset(self, blocks: list[pa.Table], *, repair: bool) -> Any:
        """The pass as Ray Data sees it: chunk numbers, through a pool of actors, then through tasks, to results."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = -1
        context.target_max_block_size = 8_000_000
        pool = ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=min(self._pool.initial, len(blocks)),
            max_size=min(self._pool.maximum, len(blocks)),
            max_tasks_in_flight_per_actor=2,
        )
        tasks = None if self._pool.postprocess_tasks is None else min(self._pool.postprocess_tasks, len(blocks))
        arguments = pickle.dumps((self._place, self._engine_factory, repair))
        with warnings.catch_warnings():
            # Ray 2.60 has no other name for max_restarts and max_task_retries, and calls every loose keyword deprecated
            warnings.simplefilter("ignore")
            return (
                ray.data.from_arrow(blocks)
                .map_batches(
                    Generate,
                    fn_constructor_args=(own_code(), self._registry, arguments),
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=pool,
                    max_restarts=-1,
                    max_task_retries=3,
                    **self._worker_options(),
                )
                .map_batches(
                    postprocess,
                    fn_args=(own_code(), self._registry, self._place),
                    batch_size=1,
                    batch_format="pyarrow",
                    num_cpus=self._pool.postprocess_cpus,
                    label_selector=self._fit_nodes(),
                    compute=ray.data.TaskPoolStrategy(size=tasks),
                )
            )

    def _worker_options(self) -> dict[str, Any]:
        """What a process with a model asks of Ray."""
        return {
            "num_cpus": self._pool.cpus,
            "num_gpus": self._pool.gpus or None,
            "resources": dict(self._pool.resources),
            "label_selector": {**self._pool.label_selector, **self._fit_nodes()},
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        }

    def _fit_nodes(self) -> dict[str, str]:
        return {"ray.io/node-id": f"!in({','.join(sorted(self._unfit))})"} if self._unfit else {}

    def _run_isolated(self, chunks: Sequence[int], *, repair: bool) -> Iterator[ChunkResult]:
        """One chunk after the other in a process of its own, with nothing else of the job at work."""
        import ray

        def seconds(chunk: int) -> float:
            group, start, stop = self._job.plan.grid.group_of(chunk)
            allowed: float = ray.get(self._registry.deadline.remote(group.first_chunk, stop - start))
            return allowed

        options = self._worker_options()
        worker = RayIsolatedWorker(self._place, self._engine_factory, options=options, seconds=seconds)
        self._isolating = True
        try:
            for chunk in chunks:
                if self._stopping.is_set():
                    return
                yield isolate_chunk(self._job, worker, chunk, repair=repair, stopping=self._stopping.is_set)
        finally:
            self._isolating = False
            worker.close()

    def _suspects(self) -> set[int]:
        import ray

        return set(ray.get(self._registry.suspects.remote()))

    def _note_vanished(self, seen: set[int]) -> None:
        """A chunk that was begun and left no result at the end of a pass: whatever postprocessed it died each time."""
        import ray

        for chunk in set(ray.get(self._registry.stop.remote())) - seen:
            self._registry.blame.remote(chunk)

    def _leave_out(self, unfit: Mapping[str, str]) -> None:
        import ray

        self._unfit.update(unfit)
        if unfit and all(node["NodeID"] in self._unfit for node in ray.nodes() if node["Alive"]):
            raise JobError(
                f"no node can work: {'; '.join(self.left_out())}; correct it and run the same command again: it resumes"
            )


def _results(dataset: Any) -> Generator[ChunkResult]:
    """Results as they come."""
    batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
    try:
        for batch in batches:
            for chunk, payload in zip(batch["chunk"].to_pylist(), batch["payload"], strict=True):
                if payload.is_valid:
                    yield pickle.loads(payload.as_buffer())  # noqa: S301 - from our own tasks
                else:
                    yield ChunkResult(chunk=chunk, outcome="skipped")
    finally:
        batches.close()


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Within, what Ray itself raises means that the cluster cannot go on: a JobError."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray gave up: {describe_fault(error)}; run the same command again: it resumes") from error


def _blocks(chunks: Sequence[int], size: int) -> list[pa.Table]:
    """The chunk numbers as tables of `size`, put by the driver: a task that cut them would need a CPU of its own."""
    numbers = pa.table({"chunk": pa.array(chunks, pa.int64())})
    return [numbers.slice(start, size) for start in range(0, len(chunks), size)]


def _shared_url(out_url: str) -> str:
    """The output as every process understands it, wherever it was started."""
    fs, inside = allowed_filesystem(out_url)
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if protocol == "memory":
        raise UsageError(f"{display_url(out_url)} lives in one process only; use --executor inline or another --out")
    return inside if protocol in {"file", "local"} else out_url
