"""Workers on a Ray cluster, kept at their number: each has a chunk to sample, one more waiting, and some to finish.

Ray starts processes, places them and tells of their death; which chunk goes where is decided here. A chunk that was
begun twice, or lost, costs work and nothing else: commit records are create-only, and the runner plans again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentmill.jobs.chunk_result import ChunkResult, describe_fault
from latentmill.jobs.code import own_code
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.faults import START_TRIES, Faults
from latentmill.jobs.executors.pool import Pool
from latentmill.jobs.executors.ray_cluster import no_process_text
from latentmill.jobs.executors.ray_entry import FINISH, MODEL, THREADS, WorkerProcess
from latentmill.jobs.executors.unloadable import Unloadable
from latentmill.jobs.plans.plan import Plan

FINISHING = 2
"""Chunks of one worker that are sampled and not committed yet; with so many it begins no further one."""

GRACE_SECONDS = 30.0
"""After its deadline a process ends itself; one that is stopped or out of reach is killed so much later."""

START_SECONDS = 60.0
"""Within this the first process answers: it takes a second or two, where nothing else runs."""

HOPELESS = 8
"""Errors in a row after which a pass ends, beside two for each actor."""

_LOOK_SECONDS = 1.0
_NODES_SECONDS = 2.0

_DEAD = "its worker process died"


@dataclass(eq=False, slots=True)
class _Worker:
    actor: Any
    node: str = ""
    ready: bool = False
    """Whether it can begin a chunk: it is not waiting for a model."""
    model: int = -1
    """The number of the model that it has, or loads."""
    deaths: int = 0
    """How often in a row one in its place has died before its model was loaded."""
    before: str = ""
    """The node where that was."""
    chunks: deque[int] = field(default_factory=deque)
    """To be sampled in this order; the first one is begun."""
    began: float = 0.0
    deadline: float = 0.0
    finishing: set[int] = field(default_factory=set)

    @property
    def held(self) -> int:
        return len(self.chunks) + len(self.finishing)


class RayPool:
    """The pool of one job. `worker_options` says what a worker asks of Ray, `nodes` what the cluster consists of.

    `growing`: nodes may join, and get workers. `on_look` is called about every second while it runs.
    """

    def __init__(
        self,
        plan: Plan,
        size: Pool,
        faults: Faults,
        unloadable: Unloadable,
        *,
        arguments: bytes,
        worker_options: Callable[[], Mapping[str, Any]],
        nodes: Callable[[], Sequence[Mapping[str, Any]]],
        growing: bool,
        on_look: Callable[[], None],
    ) -> None:
        import ray

        self._process = ray.remote(concurrency_groups=THREADS)(WorkerProcess)
        self._plan = plan
        self._grid = plan.grid
        self._size = size
        self._faults = faults
        self._unloadable = unloadable
        self._arguments = arguments
        self._worker_options = worker_options
        self._nodes = nodes
        self._growing = growing
        self._on_look = on_look
        self._workers: list[_Worker] = []
        self._calls: dict[Any, tuple[_Worker, str, int]] = {}
        self._todo: dict[int, deque[int]] = {}
        """Chunks to be begun, by model, in the models' order."""
        self._loaded: set[int] = set()
        """Models that a worker has had."""
        self._left_out: set[str] = set()
        self._wanted = size.awaited or size.initial
        self._given_up = 0
        self._looked = 0.0
        self._began = time.monotonic()
        self._answered = False
        self._probe: Any = None
        self._stopping = False

    @property
    def ready(self) -> list[str]:
        """The nodes of the workers with their model loaded: one entry a worker."""
        return [worker.node for worker in self._workers if worker.ready]

    @property
    def in_flight(self) -> int:
        """Chunks that workers have."""
        return sum(worker.held for worker in self._workers)

    @property
    def queued(self) -> int:
        """Chunks that no worker has yet."""
        return sum(map(len, self._todo.values()))

    def stop(self) -> None:
        """No chunk is begun from now on; `run` ends when those under way are done. A signal's handler may call it."""
        self._stopping = True

    def run(self, chunks: Sequence[int], *, repair: bool) -> Iterator[ChunkResult]:
        """Results as they come. Afterwards each chunk had one, but those that are suspect by now, and after a stop.

        Raises JobError if no node can work.
        """
        self._todo = {}
        for chunk in sorted(chunks):
            if not self._faults.is_suspect(chunk):
                self._todo.setdefault(self._plan.model_of(chunk), deque()).append(chunk)
        failures = 0
        while (self.queued or self.in_flight) and failures < HOPELESS + 2 * self._size.initial:
            if self._stopping:
                self._pass_on_the_stop()
            else:
                self._set_aside()
                self._keep_number()
                self._hand_out(repair=repair)
            self._on_look()
            for result in self._answers():
                if result.outcome != "skipped":
                    yield result
                failures = 0 if result.done else failures + (result.outcome == "error")
            self._kill_overdue()
            self._leave_out()
        if self.in_flight:  # with every chunk failing, the runner should hear of it now
            self.close()

    def close(self) -> None:
        """End all processes. What they had in flight stays open in the ledger."""
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()
        self._calls.clear()

    def _pass_on_the_stop(self) -> None:
        """Workers skip what they have not begun."""
        if self.queued:
            self._todo.clear()
            for worker in self._workers:
                worker.actor.stop.remote()

    def _set_aside(self) -> None:
        """Chunks of models that cannot be loaded wait for the end of the run."""
        for model in self._unloadable.reasons.keys() & self._todo.keys():
            self._unloadable.put(self._todo.pop(model))

    def _keep_number(self) -> None:
        """Start workers for the nodes as they are now, and in place of those that died."""
        now = time.monotonic()
        if now - self._looked > _NODES_SECONDS:
            self._looked = now
            if self._growing:
                fits = self._size.fits(node for node in self._nodes() if node["NodeID"] not in self._faults.unfit)
                self._wanted = self._size.awaited or min(self._size.maximum, max(self._size.initial, fits))
            if not self._answered:
                self._ask_for_life(now - self._began)
        wanted = self._wanted - self._given_up
        if wanted <= 0 and not self._workers:
            raise JobError(no_process_text("they die before they answer"))
        held = sum(len(worker.chunks) for worker in self._workers)
        while len(self._workers) < min(wanted, self.queued + held):
            self._start(_Worker(actor=None))

    def _start(self, worker: _Worker) -> None:
        options = {"max_restarts": 0, "max_task_retries": 0, **self._worker_options()}
        worker.actor = self._process.options(**options).remote(own_code())
        self._workers.append(worker)
        self._calls[worker.actor.node.remote()] = (worker, "node", -1)

    def _ask_for_life(self, seconds: float) -> None:
        """Where no worker answers, they may wait for a node; that no process at all can be started is told.

        Raises JobError in that case, in which Ray itself would try for ever.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._probe is None and seconds > START_SECONDS / 2:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._probe = self._process.options(num_cpus=0, scheduling_strategy=here).remote(own_code())
            self._calls[self._probe.node.remote()] = (_Worker(actor=self._probe), "probe", -1)
        elif seconds > START_SECONDS:
            raise JobError(no_process_text(f"none has answered within {START_SECONDS:g} s"))

    def _hand_out(self, *, repair: bool) -> None:
        """First to those with nothing to sample; a second one only if there is enough left for all.

        Who has nothing left to do of its model takes up the first one for which there are too few.
        """
        ready = [worker for worker in self._workers if worker.ready and len(worker.finishing) < FINISHING]
        for held in (0, 1):
            for worker in ready:
                todo = self._todo.get(worker.model, ())
                alike = sum(other.model == worker.model for other in ready)
                if todo and len(worker.chunks) == held and len(todo) > held * alike:
                    self._give(worker, self._todo[worker.model].popleft(), repair=repair)
        for worker in ready:
            if self.queued and not worker.held and not self._todo.get(worker.model):
                self._load(worker)

    def _load(self, worker: _Worker) -> None:
        """The worker gets the first model with more chunks to begin than workers that are about to have it."""
        loading = Counter(other.model for other in self._workers if other is not worker and not other.ready)
        model = next((model for model in sorted(self._todo) if len(self._todo[model]) > loading[model]), None)
        if model is None and worker.model < 0:
            model = min((model for model, chunks in self._todo.items() if chunks), default=0)
        if model is None:
            return
        worker.ready, worker.model = False, model
        load = worker.actor.load.options(concurrency_group=MODEL).remote(self._arguments, model)
        self._calls[load] = (worker, "load", -1)

    def _give(self, worker: _Worker, chunk: int, *, repair: bool) -> None:
        seconds = self._faults.deadline(*self._grid.pace_of(chunk))
        if not worker.chunks:
            worker.began, worker.deadline = time.monotonic(), seconds
        worker.chunks.append(chunk)
        call = worker.actor.sample.options(concurrency_group=MODEL).remote(chunk, seconds, repair=repair)
        self._calls[call] = (worker, "sample", chunk)

    def _answers(self) -> Iterator[ChunkResult]:
        """What has come within a second."""
        import ray

        waiting = list(self._calls)
        if not waiting:
            time.sleep(_LOOK_SECONDS if not self._stopping else 0)
            return
        if not ray.wait(waiting, num_returns=1, timeout=_LOOK_SECONDS)[0]:
            return
        for call in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
            if call not in self._calls:  # of a worker that is buried by now
                continue
            worker, step, chunk = self._calls.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayTaskError as error:  # what even the worker does not catch, such as SystemExit
                answer = ChunkResult(chunk=chunk, outcome="error", error=describe_fault(error), blame="chunk")
            except ray.exceptions.RayError:
                self._bury(worker)
                continue
            result = self._take(worker, step, chunk, answer)
            if result is not None:
                yield result

    def _take(self, worker: _Worker, step: str, chunk: int, answer: Any) -> ChunkResult | None:
        """What follows from an answer: the next step of a worker or of a chunk, or a chunk's result."""
        if step == "node":
            self._answered = True
            worker.node = answer
            self._load(worker)
        elif step == "load":
            self._loaded_or_not(worker, *answer)
        elif step == "sample":
            return self._sampled(worker, chunk, answer)
        elif step == "finish":
            worker.finishing.discard(chunk)
            return self._blamed(worker, answer)
        return None

    def _loaded_or_not(self, worker: _Worker, reason: str | None, _: str, of_model: str) -> None:
        """One of several models that was loaded nowhere yet is at fault itself, else the node."""
        worker.ready = reason is None
        if reason is None:
            self._loaded.add(worker.model)
            self._unloadable.note_loaded()
        elif of_model and self._may_be_at_fault(worker.model):
            self._unloadable.note_failed(worker.model, of_model)
            worker.ready, worker.model = True, -1
        else:
            self._faults.unfit.setdefault(worker.node, reason)

    def _may_be_at_fault(self, model: int) -> bool:
        return len(self._plan.models) > 1 and model not in self._loaded

    def _sampled(self, worker: _Worker, chunk: int, result: ChunkResult | None) -> ChunkResult | None:
        pace, _ = self._grid.pace_of(chunk)
        now = time.monotonic()
        worker.chunks.remove(chunk)
        if result is None:
            self._faults.note_done(worker.node, pace, now - worker.began)
            worker.finishing.add(chunk)
            call = worker.actor.finish.options(concurrency_group=FINISH).remote(chunk)
            self._calls[call] = (worker, "finish", chunk)
        if worker.chunks:
            worker.began = now
            worker.deadline = self._faults.deadline(*self._grid.pace_of(worker.chunks[0]))
        return None if result is None else self._blamed(worker, result)

    def _blamed(self, worker: _Worker, result: ChunkResult) -> ChunkResult:
        if result.outcome == "error" and result.blame == "chunk":
            self._faults.blame(result.chunk)
            self._faults.note_failure(worker.node, result.error or "")
        return result

    def _bury(self, worker: _Worker) -> None:
        """A worker is dead, or out of reach: what it had begun may be at fault; all it had is to be done again."""
        self._dismiss(worker)
        self._faults.note_death(worker.node)
        begun = {*list(worker.chunks)[:1], *worker.finishing}
        if begun or (worker.node and not worker.ready):
            self._faults.note_failure(worker.node, _DEAD)
        for chunk in begun:
            self._faults.blame(chunk)
        self._put_back(worker)
        if not worker.ready:
            self._replace_stillborn(worker)

    def _replace_stillborn(self, worker: _Worker) -> None:
        """One more in its place, which remembers, up to a few; where none on the node lives, the node is at fault."""
        deaths = worker.deaths + 1 if worker.before == worker.node else 1
        if deaths >= START_TRIES and worker.model >= 0 and self._may_be_at_fault(worker.model):
            model = self._plan.models[worker.model].source
            reason = f"the model {model} could not be loaded: its worker process died {deaths} times in a row"
            self._unloadable.note_failed(worker.model, reason)
            self._start(_Worker(actor=None))
            return
        if worker.node and not any(other.ready and other.node == worker.node for other in self._workers):
            self._faults.note_stillborn(worker.node, deaths)
        if worker.node in self._faults.unfit or self._stopping:
            return
        if deaths < START_TRIES:
            self._start(_Worker(actor=None, deaths=deaths, before=worker.node))
        else:
            self._given_up += 1

    def _dismiss(self, worker: _Worker) -> None:
        import ray

        ray.kill(worker.actor)
        if worker in self._workers:
            self._workers.remove(worker)
        self._calls = {call: entry for call, entry in self._calls.items() if entry[0] is not worker}

    def _put_back(self, worker: _Worker) -> None:
        chunks = sorted({*worker.chunks, *worker.finishing}, reverse=True)
        if not self._stopping:
            for chunk in chunks:
                if not self._faults.is_suspect(chunk):
                    self._todo.setdefault(self._plan.model_of(chunk), deque()).appendleft(chunk)

    def _kill_overdue(self) -> None:
        """A worker past its deadline by the grace did not even end itself: it is stopped, or out of reach."""
        import ray

        now = time.monotonic()
        for worker in self._workers:
            if worker.chunks and now > worker.began + worker.deadline + GRACE_SECONDS:
                ray.kill(worker.actor)  # its calls fail, and it is buried as any other

    def _leave_out(self) -> None:
        """Dismiss the workers of nodes that turned out to be unfit. Raises JobError if none is left that has room."""
        unfit = self._faults.unfit
        if self._left_out == unfit.keys():
            return
        self._left_out = set(unfit)
        for worker in [worker for worker in self._workers if worker.node in unfit]:
            self._dismiss(worker)
            self._put_back(worker)
        if not self._size.fits(node for node in self._nodes() if node["NodeID"] not in unfit):
            reasons = "; ".join(sorted(set(unfit.values())))
            raise JobError(f"no node can work: {reasons}; correct it and run the same command again: it resumes")
