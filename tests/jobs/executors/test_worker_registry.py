"""The registry's rules, with a clock that stands still until it is moved."""

from __future__ import annotations

import pytest

from latentmill.jobs.executors.worker_registry import (
    LEAST_SECONDS,
    NODE_FAULTS,
    PATIENCE,
    POOLED_TRIES,
    START_TRIES,
    UNKNOWN_SECONDS,
    WorkerRegistry,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> WorkerRegistry:
    registry = WorkerRegistry(clock=clock)
    assert registry.enter("a", "north", "handle of a")
    registry.ready("a")
    return registry


def test_a_chunk_whose_worker_died_twice_is_set_aside(registry: WorkerRegistry):
    for _ in range(POOLED_TRIES):
        assert registry.begin("a", 7, 0, 4) is not None
        assert registry.suspects() == []
        registry.enter("a", "north", "handle of a")
    assert registry.suspects() == [7]
    assert registry.begin("a", 7, 0, 4) is None
    assert registry.begin("a", 8, 0, 4) is not None


def test_an_exception_counts_like_a_death_and_a_store_that_fails_does_not(registry: WorkerRegistry):
    for _ in range(5):
        registry.begin("a", 7, 0, 4)
        registry.left("a", None)
    assert registry.suspects() == []
    for _ in range(POOLED_TRIES):
        registry.begin("a", 7, 0, 4)
        registry.left("a", "RuntimeError")
    assert registry.suspects() == [7]


def test_a_worker_that_dies_between_two_chunks_blames_none(registry: WorkerRegistry):
    for _ in range(5):
        registry.begin("a", 7, 0, 4)
        registry.done("a", 0)
        registry.enter("a", "north", "handle of a")
    assert registry.suspects() == []


def test_deadlines_follow_what_a_group_takes(registry: WorkerRegistry, clock: Clock):
    assert registry.deadline(0, 32) == 32 * UNKNOWN_SECONDS
    registry.begin("a", 1, 0, 32)
    clock.now += 50
    registry.done("a", 0)
    assert registry.deadline(0, 32) == PATIENCE * 50
    assert registry.deadline(9, 32) == 32 * UNKNOWN_SECONDS
    registry.begin("a", 2, 5, 32)
    registry.done("a", 5)
    assert registry.deadline(5, 32) == LEAST_SECONDS
    assert WorkerRegistry(chunk_seconds=9.0).deadline(0, 32) == 9.0


def test_who_is_past_the_deadline_is_told_to_the_driver(registry: WorkerRegistry, clock: Clock):
    seconds = registry.begin("a", 1, 0, 1)
    assert seconds is not None
    clock.now += seconds + 29
    assert registry.overview(30).overdue == ()
    clock.now += 2
    assert registry.overview(30).overdue == ("handle of a",)


def test_a_node_that_only_fails_is_left_out_and_one_success_clears_it(registry: WorkerRegistry):
    for chunk in range(NODE_FAULTS - 1):
        registry.begin("a", chunk, 0, 1)
        registry.left("a", "boom")
    registry.begin("a", 100, 0, 1)
    registry.done("a", 0)
    assert registry.overview(30).unfit == {}
    for chunk in range(200, 200 + NODE_FAULTS):
        registry.begin("a", chunk, 0, 1)
        registry.left("a", "boom")
    assert registry.overview(30).unfit == {"north": f"{NODE_FAULTS} failures in a row, the last: boom"}
    assert not registry.enter("b", "north", None)
    assert registry.enter("c", "south", None)


def test_a_node_without_the_model_is_left_out_at_once(registry: WorkerRegistry):
    registry.unfit("north", "corrupt")
    assert registry.overview(30).unfit == {"north": "corrupt"}


def test_a_node_where_a_worker_never_gets_ready_is_left_out_unless_others_do(registry: WorkerRegistry):
    for node in ("south", "north"):
        for _ in range(START_TRIES):
            assert registry.enter(f"b in the {node}", node, None)
    assert registry.overview(30).unfit == {}
    registry.enter("b in the north", "north", None)  # a is ready there: something may be wrong with b alone
    assert not registry.enter("b in the south", "south", None)
    died = f"a worker process died {START_TRIES} times in a row while it loaded the model"
    assert registry.overview(30).unfit == {"south": died}


def test_a_start_that_succeeds_is_the_end_of_a_row_of_deaths(registry: WorkerRegistry):
    for _ in range(2 * START_TRIES):
        registry.enter("b", "south", None)
        registry.enter("b", "south", None)
        registry.ready("b")
    assert registry.overview(30).unfit == {}


def test_a_stop_names_what_is_under_way_and_nothing_begins_until_the_next_pass(registry: WorkerRegistry):
    registry.begin("a", 3, 0, 1)
    assert registry.stop() == [3]
    assert registry.begin("a", 4, 0, 1) is None
    registry.start_pass()
    assert registry.begin("a", 4, 0, 1) is not None


def test_a_registry_that_was_lost_starts_afresh_and_stops_nobody(clock: Clock):
    registry = WorkerRegistry(clock=clock)
    seconds = registry.begin("known to the registry before", 4, 0, 2)
    assert seconds == 2 * UNKNOWN_SECONDS
    registry.done("known to the registry before", 0)
    registry.begin("known to the registry before", 5, 0, 2)
    clock.now += 1e6
    assert registry.overview(30).overdue == ()
