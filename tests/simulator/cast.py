"""Who acts: drivers with their crews, cleaners, and the two plans they may have. All protocol code is the real one."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import latentmill.jobs.ledger.ledger
import latentmill.jobs.ledger.picture_store
import latentmill.jobs.outputs.clean
import latentmill.jobs.outputs.merge
import latentmill.jobs.plans.plan
import latentmill.jobs.runner
import latentmill.jobs.store.storage
import latentmill.jobs.worker
from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.executors.chunk_runner import ChunkRunner
from latentmill.jobs.interrupt import Interrupt
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.ledger import Ledger, record_path, repair_path
from latentmill.jobs.outputs.publish import MANIFEST_PATH
from latentmill.jobs.runner import RunSummary
from latentmill.jobs.spec import Runtime
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from tests.simulator.plans import PLAN_BY_HASH, Draft, SimulatedEngine, SimulatedPlan
from tests.simulator.reading import decode_once, failed_samples, standing_plan
from tests.simulator.world import URL, Actor, SerialPool, SimulatedStorage, World


class Crew:
    """An executor: one or two workers that share a queue. Who is given up is not waited for, but may still work."""

    def __init__(self, cast: Cast, driver: Actor) -> None:
        self._cast = cast
        self._driver = driver

    def run(self, chunks: Sequence[int], *, repair: bool = False) -> Iterator[ChunkResult]:
        world = self._cast.world
        order = list(chunks)
        world.random.shuffle(order)
        queue, results = deque(order), deque[ChunkResult]()
        crew = [self._hire(queue, results, repair=repair) for _ in range(world.random.randint(1, 2))]
        self._cast.crews.setdefault(self._driver.name, []).extend(crew)
        while results or any(not worker.over and not worker.given_up for worker in crew):
            if results:
                yield results.popleft()
            else:
                world.pause(0.1)

    def stop(self) -> bool:
        return True

    def describe(self) -> str:
        return "simulated"

    def live_actors(self) -> int:
        return 1

    def left_out(self) -> Sequence[str]:
        return ()

    def close(self) -> None:
        pass

    def _hire(self, queue: deque[int], results: deque[ChunkResult], *, repair: bool) -> Actor:
        world, chance = self._cast.world, self._cast.heals if repair else 0.0

        def engine(plan: Any, _: str) -> SimulatedEngine:
            return SimulatedEngine(plan, lambda _: world.random.random() < chance)

        def work() -> None:
            try:
                runner = ChunkRunner(open_job(URL), engine_factory=engine)
            except (StorageError, UsageError):
                return  # the actor cannot load its plan; the driver's next pass hires another
            while queue and not worker.given_up:
                results.append(runner.chunk(queue.popleft(), repair=repair))

        worker = world.spawn(f"worker{next(self._cast.numbers)}", work, mortal=self._driver.mortal)
        return worker


class Cast:
    """Puts actors into a world and remembers how drivers ended."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.numbers = itertools.count(1)
        self.tokens = itertools.count(1)
        self.crews: dict[str, list[Actor]] = {}
        self.summaries: list[RunSummary] = []
        self.conflicts = self.lost = self.repaired = self.cleaned = 0
        self.heals = 0.6
        """The chance that a sample which failed does not fail again when it is repaired."""

    def driver(
        self, plan: SimulatedPlan, *, retry: bool = False, lives: int = 1, after: float = 0.0, mortal: bool = True
    ) -> Actor:
        """Someone who types `latentmill run` (`--retry-failed`), and again when it is lost, `lives` times in all."""
        name = f"driver{next(self.numbers)}"
        ready = [True]
        runtime = Runtime(executor="inline", retry_failed=retry)
        spec = SimpleNamespace(out=URL, plan=plan, dated=None, runtime=runtime)

        def restart() -> None:
            for worker in self.crews.pop(name, []):
                if not worker.over and actor.dead and self.world.random.random() < 0.5:
                    self.world.kill(worker)
                worker.given_up = True
            if ready.pop() and lives > 1:
                self.driver(plan, retry=retry, lives=lives - 1, after=self.world.random.uniform(0, 20), mortal=mortal)
            ready.append(False)

        def drive() -> None:
            failed = failed_samples(self.world.store.objects, plan)
            try:
                self._finished(plan, latentmill.jobs.runner.run_job(spec), failed)
            except OutputConflictError:
                self.conflicts += 1
                if standing_plan(self.world.store.objects) is plan:
                    self.world.report("I7: a driver was refused by an output that has its own plan")
            except (StorageError, UsageError):
                restart()
            except JobError as error:
                if "still open" not in str(error):
                    self.world.report(f"I2/I9: a driver cannot publish: {error}")
                restart()

        actor = self.world.spawn(name, drive, after=after, mortal=mortal)
        actor.on_loss = restart
        return actor

    def cleaner(self, cleanings: int, *, longest_pause: float, mortal: bool = True) -> Actor:
        """Someone who types `latentmill clean` now and then."""

        def clean() -> None:
            for _ in range(cleanings):
                self.world.pause(self.world.random.uniform(0, longest_pause))
                try:
                    self.cleaned += latentmill.jobs.outputs.clean.clean(URL).images
                except (StorageError, UsageError):
                    continue  # there is no plan yet, or the store is out of order

        return self.world.spawn(f"cleaner{next(self.numbers)}", clean, mortal=mortal)

    def _finished(self, plan: SimulatedPlan, summary: RunSummary, failed_before: set[int]) -> None:
        self.summaries.append(summary)
        objects = self.world.store.objects
        if standing_plan(objects) is not plan or MANIFEST_PATH not in objects:
            self.world.report("I9: a driver ended with success, and its plan is not published")
        failed = -1 if summary.counts is None else summary.counts["failed"]
        if not len(failed_samples(objects, plan)) <= failed <= len(failed_before):
            self.world.report(f"I9: a driver speaks of {failed} failed samples, there were {failed_before} before")
        if summary.exit_code != int(failed > 0):
            self.world.report(f"I9: a driver's exit code is {summary.exit_code}, with {failed} failed samples")

    def token(self, size: int) -> str:
        return f"{next(self.tokens):0{2 * size}x}"

    def open_executor(self, *_: Any) -> Crew:
        actor = self.world.current
        assert actor is not None
        return Crew(self, actor)


_encoded: dict[tuple[Any, ...], bytes] = {}
_processed: dict[tuple[str, str, str | None], Any] = {}
_encode, _postprocess_sample = latentmill.jobs.worker.encode_record, latentmill.jobs.worker.postprocess_sample


def _encode_once(rows: Any, schema: Any, **how: Any) -> bytes:
    """A record is a function of plan, chunk, attempt and rows here: schedules share the work of writing Parquet."""
    key = (how["plan_hash"], how["chunk"], how["attempt"], how["repair"])
    key += tuple((row["sample_id"], row["status"]) for row in rows)
    if key not in _encoded:
        _encoded[key] = _encode(rows, schema, **how)
    return _encoded[key]


def postprocess_once(plan: Any, sample: Any, result: Any, execution_class: str) -> Any:
    key = (plan.plan_hash, sample.sample_id, result.error)
    if key not in _processed:
        _processed[key] = _postprocess_sample(plan, sample, result, execution_class)
    return _processed[key]


@contextmanager
def installed(world: World, cast: Cast) -> Iterator[None]:
    """The real code, with the world in place of store, clock, threads and chance."""
    pool = lambda *_, **__: SerialPool(world)  # noqa: E731 - several classes' stand-in
    tokens = SimpleNamespace(token_hex=cast.token)
    with ExitStack() as patches:
        for target, name, value in (
            (Storage, "open", staticmethod(lambda _: SimulatedStorage(world))),
            (latentmill.jobs.store.storage, "_sleep", world.pause),
            (latentmill.jobs.store.storage, "_clock", lambda: world.now),
            (latentmill.jobs.store.storage, "random", world.random),
            (latentmill.jobs.store.storage, "secrets", tokens),
            (latentmill.jobs.worker, "secrets", tokens),
            (latentmill.jobs.outputs.clean, "secrets", tokens),
            (latentmill.jobs.ledger.ledger, "ThreadPoolExecutor", pool),
            (latentmill.jobs.ledger.picture_store, "ThreadPoolExecutor", pool),
            (latentmill.jobs.outputs.merge, "ThreadPoolExecutor", pool),
            (latentmill.jobs.outputs.clean, "ThreadPoolExecutor", pool),
            (latentmill.jobs.plans.plan, "parse_plan", lambda data, _: PLAN_BY_HASH[json.loads(data)["plan_hash"]]),
            (latentmill.jobs.runner, "draft_plan", _draft),
            (latentmill.jobs.runner, "open_executor", cast.open_executor),
            (latentmill.jobs.runner, "graceful_interrupt", _uninterrupted),
            (latentmill.jobs.ledger.ledger, "decode_record", decode_once),
            (latentmill.jobs.worker, "encode_record", _encode_once),
            (latentmill.jobs.worker, "postprocess_sample", postprocess_once),
            (Ledger, "_create", _truthful(cast, Ledger._create)),
        ):
            patches.enter_context(patch.object(target, name, value))
        yield


def _truthful(cast: Cast, create: Callable[..., str]) -> Callable[..., str]:
    """What `commit` and `commit_repair` say, compared with what stands in the store."""

    def checked(self: Ledger, chunk: int, number: int, attempt: str, data: bytes) -> str:
        outcome = create(self, chunk, number, attempt, data)
        cast.lost += outcome == "lost"
        cast.repaired += outcome == "mine" and number > 0
        stands = cast.world.store.objects.get(repair_path(chunk, number) if number else record_path(chunk))
        winner = None if stands is None else decode_once(stands).attempt
        if winner is None or (outcome == "mine") != (winner == attempt):
            cast.world.report(
                f"I1: chunk {chunk}, repair {number}: {attempt} was told {outcome!r}, but {winner}'s record stands"
            )
        return outcome

    return checked


@contextmanager
def _draft(spec: Any, **_: Any) -> Iterator[Draft]:
    yield Draft(spec.plan)


class _Deaf(Interrupt):
    """The test's own signals stay with the test."""

    def listen(self) -> dict[int, Any]:
        return {}


@contextmanager
def _uninterrupted(on_stop: Callable[[], None]) -> Iterator[Interrupt]:
    yield _Deaf(on_stop)
