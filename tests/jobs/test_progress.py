"""What a run says of its own progress: work left, pictures a second, and a time that settles and comes true."""

from __future__ import annotations

import heapq
import itertools
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.plans.planning import draft_plan
from latentmill.jobs.plans.work import ChunkWork
from latentmill.jobs.progress import Progress, Tracker
from tests.jobs.driver import job_spec

SETTLED = 60.0


@pytest.fixture
def plan(tiny_model, manifest, tmp_path) -> Callable[..., Plan]:
    """The plan of so many rows with these settings."""

    def make(rows: int = 4, **settings: object) -> Plan:
        with draft_plan(job_spec(tiny_model, manifest(rows), tmp_path / "out", **settings)) as draft:
            return draft.plan()

    return make


@dataclass
class Fleet:
    """Workers without a model: each draws one chunk after the other, and finishes them beside that.

    A worker is there from `joins` to `dies`; its chunk then goes to another. A result is heard at the next multiple of
    `lump` seconds. `unlike` spreads what chunks take, by a seeded generator.
    """

    plan: Plan
    seconds: Callable[[int], float]
    workers: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"one": (0.0, np.inf)})
    unlike: float = 0.0
    lump: float = 0.0
    finishing: float = 1.0
    load_seconds: float = 0.0
    loaded: bool = True
    """Whether the first model is there when a worker joins."""
    reused: Callable[[int], int] = lambda _: 0
    committed: frozenset[int] = frozenset()
    progress: list[tuple[float, Progress]] = field(default_factory=list)
    now: float = 0.0

    def run(self) -> list[tuple[float, Progress]]:
        """Each state that was shown while pictures were drawn, with its time."""
        open_chunks = np.ones(self.plan.n_chunks, dtype=np.bool_)
        tracker = Tracker(self.plan, open_chunks, lambda state: None, lambda: self.now)
        done = np.zeros(self.plan.n_chunks, dtype=np.bool_)
        done[list(self.committed)] = True
        tracker.begin_pass(done, self.live)
        tracker._on_progress = lambda state: self.progress.append((self.now, state))
        for heard, result in sorted(self._results(), key=lambda entry: entry[0]):
            self.now = heard
            tracker.add(result)
        return self.progress

    def live(self) -> int:
        return sum(joins <= self.now < dies for joins, dies in self.workers.values())

    def _results(self) -> list[tuple[float, ChunkResult]]:
        draws = np.random.default_rng(2026)
        todo = deque(chunk for chunk in range(self.plan.n_chunks) if chunk not in self.committed)
        free = [(joins, name) for name, (joins, _) in self.workers.items()]
        heapq.heapify(free)
        loaded = dict.fromkeys(self.workers, 0 if self.loaded else -1)
        results = []
        while todo:
            now, name = heapq.heappop(free)
            chunk = todo.popleft()
            samples = self.plan.grid.pace_of(chunk)[1]
            drawn = (samples - self.reused(chunk)) / samples
            took = self.seconds(chunk) * drawn * draws.uniform(1 - self.unlike, 1 + self.unlike) + 0.01
            loading = self.load_seconds * (loaded[name] != self.plan.model_of(chunk))
            if now + loading + took > self.workers[name][1]:
                todo.appendleft(chunk)
                continue
            loaded[name] = self.plan.model_of(chunk)
            end = now + loading + took
            result = ChunkResult(
                chunk=chunk,
                outcome="committed",
                ok=samples,
                actor=name,
                stages={"sample": took, "encode": self.finishing, **({"load": loading} if loading else {})},
                reused=self.reused(chunk),
            )
            heard = end + self.finishing
            results.append((math.ceil(heard / self.lump) * self.lump if self.lump else heard, result))
            heapq.heappush(free, (end, name))
        return results


def worst(states: list[tuple[float, Progress]], *, after: float = SETTLED, slack: float) -> float:
    """The greatest error of the time that was told, as a share of the truth, beside so many seconds of slack."""
    end = states[-1][0]
    told = [(now, state.eta_seconds) for now, state in states if after <= now < end]
    assert len(told) > 3
    assert all(eta is not None for _, eta in told)
    return max((abs(eta - (end - now)) - slack) / (end - now) for now, eta in told)


def by_passes(plan: Plan, each: float, beside: float) -> Callable[[int], float]:
    """Seconds of a chunk on a machine that needs `each` for a run of the denoiser, and `beside` for every batch."""

    def seconds(chunk: int) -> float:
        section, start, stop = plan.grid.section_of(chunk)
        steps = sum(group.loop[1] * (last - first) for group, first, last in section.cut(start, stop))
        pixels = section.groups[0].key[0] * section.groups[0].key[1] / 64**2
        return pixels * (steps * each + (stop - start) * beside)

    return seconds


FLEET = {name: (number * 3.0, np.inf) for number, name in enumerate("abcd")}


def test_one_steady_worker_is_right_after_its_first_chunk(plan):
    job = plan(80, chunk_size=2)
    states = Fleet(job, lambda _: 20.0, unlike=0.05).run()
    assert worst(states, after=20.0, slack=1.0) < 0.1


@pytest.mark.parametrize("lump", [0.0, 7.0, 20.0])
def test_results_that_come_in_bursts_change_nothing(plan, lump):
    job = plan(400, chunk_size=2)
    states = Fleet(job, lambda _: 20.0, workers=FLEET, unlike=0.2, lump=lump).run()
    assert worst(states, slack=20.0 + lump) < 0.1


def test_chunks_of_a_blink_are_steady_too(plan):
    job = plan(4000, chunk_size=2)
    states = Fleet(job, lambda _: 0.2, workers=FLEET, unlike=0.5, finishing=0.1).run()
    assert worst(states, after=10.0, slack=0.5) < 0.1


@pytest.mark.parametrize("beside", [1.0, 2.5, 4.0])
def test_steps_from_ten_to_fifty_are_told_from_the_first_ones(plan, beside):
    """The cheapest chunks come first. What a batch costs beside its steps is not known then, and is learned."""
    job = plan(40, chunk_size=4, batch_size=4, sweep={"num_inference_steps": list(range(10, 51, 5))})
    seconds = by_passes(job, each=0.1, beside=0.1 * beside)
    assert max(map(seconds, range(job.n_chunks))) > 3 * min(map(seconds, range(job.n_chunks)))
    states = Fleet(job, seconds, workers=FLEET, unlike=0.1).run()
    assert worst(states, after=40.0, slack=max(map(seconds, range(job.n_chunks)))) < 0.1


def test_sizes_are_told_by_their_pixels(plan):
    job = plan(60, chunk_size=4, batch_size=4, sweep={"width": [64, 128, 256]})
    seconds = by_passes(job, each=0.5, beside=1.0)
    states = Fleet(job, seconds, workers=FLEET, unlike=0.1).run()
    assert worst(states, after=40.0, slack=max(map(seconds, range(job.n_chunks)))) < 0.1


def test_a_size_that_is_slower_than_its_pixels_corrects_its_own_rest_only(plan):
    """Attention grows with the square. Half of the job is wide; each half is told right by its own chunks."""
    job = plan(160, chunk_size=2, sweep={"width": [64, 128]})
    states = Fleet(job, lambda chunk: 10.0 if chunk < 80 else 40.0, workers=FLEET, unlike=0.05).run()
    wide = next(now for now, state in states if state.chunks_done == 90)
    assert worst(states, after=wide, slack=40.0) < 0.1


def test_a_worker_that_joins_or_dies_counts_at_once_or_after_half_a_minute(plan):
    job = plan(600, chunk_size=2)
    workers = {**FLEET, "late": (200.0, np.inf), "later": (200.0, np.inf), "a": (0.0, 611.0)}
    states = Fleet(job, lambda _: 15.0, workers=workers, unlike=0.1).run()
    end = states[-1][0]
    for begin, until in ((220.0, 600.0), (660.0, end - 60)):
        part = [(now, state) for now, state in states if begin <= now < until]
        for _, state in part:
            left = (state.chunks_total - state.chunks_done) * 15.0
            assert state.eta_seconds == pytest.approx(left / state.actors, rel=0.1)
    assert worst(states, after=660.0, slack=15.0) < 0.1


def test_a_resumed_job_begins_where_it_stopped(plan):
    job = plan(400, chunk_size=2)
    states = Fleet(job, lambda _: 10.0, workers=FLEET, unlike=0.1, committed=frozenset(range(120))).run()
    assert states[0][1].chunks_done == 121
    assert worst(states, slack=10.0) < 0.1


def test_cells_that_were_reused_in_part_make_their_chunks_cheaper(plan):
    job = plan(400, chunk_size=4)
    states = Fleet(job, lambda _: 20.0, workers=FLEET, unlike=0.1, reused=lambda _: 3).run()
    assert worst(states, after=30.0, slack=5.0) < 0.1


def test_chunks_that_another_output_had_whole_say_nothing_of_the_others(plan):
    """A night's sweep with one value more: all of the old values come first, in no time."""
    job = plan(60, chunk_size=4, batch_size=4, sweep={"num_inference_steps": [10, 11, 12, 40]})
    whole = 3 * 15
    fleet = Fleet(job, lambda _: 20.0, workers=FLEET, unlike=0.1, reused=lambda chunk: 4 if chunk < whole else 0)
    states = fleet.run()
    early = [state.eta_seconds for _, state in states if state.chunks_done <= whole]
    assert set(early) == {None}
    assert worst(states, after=21.0, slack=20.0) < 0.1


def test_models_that_are_still_to_be_loaded_take_their_time(tiny_model, plan, tmp_path):
    copies = (shutil.copytree(tiny_model, tmp_path / f"model{number}") for number in range(3))
    models = [str(tiny_model), *map(str, copies)]
    job = plan(80, chunk_size=2, sweep={"model": models})
    assert len(job.models) == 4
    fleet = Fleet(job, lambda _: 20.0, workers=FLEET, unlike=0.1, load_seconds=40.0, loaded=False)
    assert worst(fleet.run(), after=100.0, slack=20.0) < 0.1


def test_the_time_runs_on_between_results(plan):
    seen: list[Progress] = []
    job = plan(40, chunk_size=2)
    now = itertools.count(0.0, 10.0)
    tracker = Tracker(job, np.ones(20, dtype=np.bool_), seen.append, lambda: next(now))
    tracker.show("starting")
    assert seen[-1].eta_seconds is None
    tracker.begin_pass(np.zeros(20, dtype=np.bool_), lambda: 1)
    tracker.add(ChunkResult(chunk=0, outcome="committed", ok=2, actor="a", stages={"sample": 10.0}))
    assert seen[-1].eta_seconds == pytest.approx(190.0)
    assert seen[-1].eta_at(seen[-1].made_at + 30) == pytest.approx(160.0)
    assert seen[-1].eta_at(seen[-1].made_at + 1000) == 0.0


def test_the_work_of_open_chunks_is_summed_by_arithmetic(plan):
    job = plan(
        7, chunk_size=3, batch_size=2, sweep={"num_inference_steps": [1, 2, 5], "width": [64, 72], "seed": [1, 2]}
    )
    work = ChunkWork(job.grid, job.batch_size)
    draws = np.random.default_rng(1)
    for still_open in [np.ones(job.n_chunks, bool), *(draws.random((20, job.n_chunks)) < 0.5)]:
        chunks, amount = np.zeros(len(job.grid.groups)), np.zeros(len(job.grid.groups))
        for chunk in np.flatnonzero(still_open).tolist():
            kind, its_work = work.of(chunk)
            chunks[kind] += 1
            amount[kind] += its_work
        left = work.left(still_open)
        assert left.chunks.tolist() == chunks.tolist()
        assert left.work == pytest.approx(amount)


def test_a_result_costs_as_much_in_a_large_job_as_in_a_small_one(plan):
    """Seconds of this thread for a thousand results."""
    spent = []
    for rows in (20, 20_000):
        job = plan(rows, chunk_size=1, sweep={"seed": list(range(10))})
        tracker = Tracker(job, np.ones(job.n_chunks, dtype=np.bool_), lambda _: None)
        tracker.begin_pass(np.zeros(job.n_chunks, dtype=np.bool_), lambda: 1)
        began = time.thread_time()
        for chunk in range(100):
            tracker.add(ChunkResult(chunk=chunk, outcome="committed", ok=1, actor="a", stages={"sample": 1.0}))
        spent.append(time.thread_time() - began)
    assert spent[1] < 5 * spent[0] + 0.01
