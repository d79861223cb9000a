"""Ray Data over chunk numbers: actors generate, CPU tasks finish and commit, and the ledger decides what is done.

Ray gives pool scaling, backpressure and the replacement of dead actors and nodes. It may drop a chunk or run one
twice; commit records are create-only and the runner plans `all - committed` again, so neither matters.
"""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.errors import JobError, UsageError
from jobs.executors.ray_cluster import FEEDER_CPUS, connect
from jobs.plans.plan import Plan
from jobs.spec import Runtime
from jobs.store.errors import StorageError
from jobs.store.urls import allowed_filesystem, display_url
from jobs.worker import ChunkGenerator, EngineFactory, GeneratedChunk, Receipt, finish_chunk, load_engine

FINISHER_CPUS = 0.5
ACTOR_CPUS = 0.5
"""An actor thread and a finisher share a core: on two cores two of each can run."""

SINGLE_BLOCKS = 20_000
"""Up to here every chunk is a block of its own, which spreads best; beyond, blocks of eight keep the driver small."""


class RayExecutor:
    """Chunks on a Ray cluster: the one at `runtime.address` or RAY_ADDRESS, else one of its own on this machine."""

    def __init__(self, plan: Plan, runtime: Runtime, *, engine_factory: EngineFactory = load_engine) -> None:
        self._engine_factory = engine_factory
        self._device = plan.device
        self._threads = plan.threads_per_actor or 1
        self._connection = connect(runtime.address, insecure=runtime.insecure_ray)
        try:
            self._pool = _pool(plan, runtime, self._connection.resources())
        except BaseException:
            self._connection.close()
            raise
        self._closed = False
        self._counted: tuple[float, int] = (0.0, 0)

    def run(self, out_url: str, chunks: Sequence[int]) -> Iterator[Receipt]:
        """Run the chunks, in any order. Closing the iterator cancels what is in flight: it stays open in the ledger."""
        import ray

        if not chunks:
            return
        out_url = _shared_url(out_url)
        size = min(self._pool.actors, len(chunks))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = -1
        context.target_max_block_size = 8_000_000
        dataset = ray.data.from_arrow(_slices(chunks)).repartition(
            target_num_rows_per_block=1 if len(chunks) <= SINGLE_BLOCKS else 8
        )
        with warnings.catch_warnings():
            # Ray 2.60 has no other name for max_restarts and max_task_retries, and calls every loose keyword deprecated
            warnings.simplefilter("ignore")
            dataset = dataset.map_batches(
                _Generate,
                fn_constructor_args=(out_url, self._device, self._engine_factory),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=self._pool.cpus,
                num_gpus=self._pool.gpus or None,
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=2
                ),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
                max_restarts=-1,
                max_task_retries=3,
            ).map_batches(_finish, fn_args=(out_url,), batch_size=1, batch_format="pyarrow", num_cpus=FINISHER_CPUS)
        yield from _until_hopeless(_receipts(dataset), patience=8 + 2 * size)

    def describe(self) -> str:
        """Where the work runs."""
        kind = f"{self._pool.gpus:g} GPU each" if self._pool.gpus else f"CPU, {self._threads} thread(s) each"
        return f"Ray ({self._connection.where}), up to {self._pool.actors} actors, {kind}"

    def live_actors(self) -> int:
        """Actors that are up with their model loaded, as the cluster saw it within the last second."""
        asked, count = self._counted
        if self._closed:
            return 0
        if time.monotonic() - asked > 1.0:
            count = _count_actors()
            self._counted = (time.monotonic(), count)
        return count

    def close(self) -> None:
        """Disconnect, and end the cluster if it was started here; nobody else's cluster is ever stopped."""
        self._closed = True
        self._connection.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pool:
    """How many actors, and what each one asks of Ray."""

    actors: int
    cpus: float
    gpus: float


def _pool(plan: Plan, runtime: Runtime, resources: dict[str, float]) -> _Pool:
    """Actors for every GPU there is, else for every `threads_per_actor` cores."""
    have_gpus, have_cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if plan.device == "cuda" and not have_gpus:
        raise JobError("device is cuda but the Ray cluster has no GPU; add GPU nodes, or plan the job with device cpu")
    on_gpu = have_gpus > 0 and plan.device != "cpu" and runtime.gpus_per_actor != 0
    if runtime.gpus_per_actor and not on_gpu:
        raise JobError(
            f"gpus_per_actor is {runtime.gpus_per_actor:g} but the job can use no GPU here (the cluster has "
            f"{have_gpus:g}, device is {plan.device}); leave gpus_per_actor out"
        )
    gpus = (runtime.gpus_per_actor or 1.0) if on_gpu else 0.0
    threads = plan.threads_per_actor or 1
    cpus = runtime.cpus_per_actor if runtime.cpus_per_actor is not None else (0.0 if on_gpu else ACTOR_CPUS * threads)
    room = max(have_cpus - FEEDER_CPUS - FINISHER_CPUS, 0.0)
    by_cpu = int(room // cpus) if cpus else 10_000
    wanted = runtime.num_actors or int(have_gpus // gpus if gpus else max((have_cpus - FEEDER_CPUS) // threads, 1))
    actors = min(wanted, by_cpu)
    if actors < 1 or have_cpus < FEEDER_CPUS + FINISHER_CPUS:
        raise JobError(
            f"an actor asks for {cpus:g} CPUs and {gpus:g} GPUs beside {FEEDER_CPUS + FINISHER_CPUS:g} CPUs for other "
            f"work, but the cluster has {have_cpus:g} CPUs and {have_gpus:g} GPUs; lower cpus_per_actor or "
            f"gpus_per_actor, or use a larger cluster"
        )
    return _Pool(actors=actors, cpus=cpus, gpus=gpus)


class _Generate:
    """An actor: one model, loaded once. No exception leaves it, for Ray would drop the whole block in silence."""

    def __init__(self, out_url: str, device: str, engine_factory: EngineFactory) -> None:
        self._generator: ChunkGenerator | None = None
        self._fault = ""
        try:
            self._generator = ChunkGenerator(out_url, device=device, engine_factory=engine_factory)
        except Exception as error:  # noqa: BLE001 - an actor that dies in its constructor is restarted for ever
            self._fault = f"the model could not be loaded: {_one_line(error)}"

    def __call__(self, batch: pa.Table) -> pa.Table:
        chunk = int(batch["chunk"][0].as_py())
        if self._generator is None:
            time.sleep(1.0)  # so that a broken node does not swallow the chunks of the sound ones
            return _packed(Receipt(chunk=chunk, outcome="error", error=self._fault))
        try:
            return _packed(self._generator.generate(chunk))
        except Exception as error:  # noqa: BLE001 - see the class
            if "CUDA error" in str(error):
                os._exit(1)  # after one such error every call fails; Ray starts a fresh process and tries again
            return _packed(Receipt(chunk=chunk, outcome="error", error=_one_line(error), actor=self._generator.actor))


def _finish(batch: pa.Table, out_url: str) -> pa.Table:
    """Watermark, encode, write and commit one chunk; a receipt passes through."""
    generated: GeneratedChunk | Receipt = pickle.loads(batch["payload"][0].as_buffer())  # noqa: S301 - from our own actor
    if isinstance(generated, Receipt):
        return _packed(generated)
    try:
        return _packed(finish_chunk(out_url, generated))
    except Exception as error:  # noqa: BLE001 - Ray would drop the block in silence; the receipt says what happened
        fault = str(error) if isinstance(error, StorageError) else _one_line(error)
        return _packed(Receipt(chunk=generated.chunk, outcome="error", error=fault, actor=generated.actor))


def _packed(item: GeneratedChunk | Receipt) -> pa.Table:
    """One row with one binary cell, so that no block boundary can ever run through a chunk."""
    return pa.table({"payload": pa.array([pickle.dumps(item, protocol=5)], pa.large_binary())})


def _receipts(dataset: Any) -> Iterator[Receipt]:
    """Receipts as they come. Raises JobError when the cluster cannot go on."""
    import ray

    batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
    try:
        for batch in batches:
            for cell in batch["payload"]:
                receipt = pickle.loads(cell.as_buffer())  # noqa: S301 - from our own tasks
                yield receipt
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray gave up: {_one_line(error)}; run the same command again: it resumes") from error
    finally:
        batches.close()


def _until_hopeless(receipts: Iterator[Receipt], *, patience: int) -> Iterator[Receipt]:
    """Stop after `patience` errors in a row: with every chunk failing, the runner should hear of it now."""
    failures = 0
    try:
        for receipt in receipts:
            yield receipt
            failures = 0 if receipt.done else failures + 1
            if failures >= patience:
                return
    finally:
        receipts.close()  # type: ignore[attr-defined]


def _count_actors() -> int:
    # the public way needs the dashboard; the table is small, one entry for each actor of this session
    from ray._private.state import actors

    return sum(
        1
        for actor in actors().values()
        if actor["State"] == "ALIVE" and _Generate.__name__ in actor.get("ActorClassName", actor.get("Name", ""))
    )


def _slices(chunks: Sequence[int]) -> list[pa.Table]:
    """The chunk numbers as at most 50 tables: more would cost the driver memory, one would feed slowly."""
    numbers = pa.table({"chunk": pa.array(chunks, pa.int64())})
    step = -(-len(chunks) // 50)
    return [numbers.slice(start, step) for start in range(0, len(chunks), step)]


def _shared_url(out_url: str) -> str:
    """The output as every process understands it, wherever it was started."""
    fs, inside = allowed_filesystem(out_url)
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if protocol == "memory":
        raise UsageError(f"{display_url(out_url)} lives in one process only; use --executor inline or another --out")
    return inside if protocol in {"file", "local"} else out_url


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
