"""The roster's rules, with a clock that stands still until it is moved."""

from __future__ import annotations

import pytest

from latentmill.jobs.executors.roster import (
    COMPANY_TRIES,
    LEAST_SECONDS,
    NODE_TROUBLES,
    PATIENCE,
    START_TRIES,
    UNKNOWN_SECONDS,
    Roster,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(clock: Clock) -> Roster:
    roster = Roster(clock=clock)
    assert roster.enter("a", "north", "handle of a")
    roster.ready("a")
    return roster


def test_a_chunk_whose_worker_died_twice_is_set_aside(roster: Roster):
    for _ in range(COMPANY_TRIES):
        assert roster.begin("a", 7, 0, 4) is not None
        assert roster.troubled() == []
        roster.enter("a", "north", "handle of a")
    assert roster.troubled() == [7]
    assert roster.begin("a", 7, 0, 4) is None
    assert roster.begin("a", 8, 0, 4) is not None


def test_an_exception_counts_like_a_death_and_a_store_that_fails_does_not(roster: Roster):
    for _ in range(5):
        roster.begin("a", 7, 0, 4)
        roster.left("a", None)
    assert roster.troubled() == []
    for _ in range(COMPANY_TRIES):
        roster.begin("a", 7, 0, 4)
        roster.left("a", "RuntimeError")
    assert roster.troubled() == [7]


def test_a_worker_that_dies_between_two_chunks_blames_none(roster: Roster):
    for _ in range(5):
        roster.begin("a", 7, 0, 4)
        roster.done("a", 0)
        roster.enter("a", "north", "handle of a")
    assert roster.troubled() == []


def test_deadlines_follow_what_a_group_takes(roster: Roster, clock: Clock):
    assert roster.deadline(0, 32) == 32 * UNKNOWN_SECONDS
    roster.begin("a", 1, 0, 32)
    clock.now += 50
    roster.done("a", 0)
    assert roster.deadline(0, 32) == PATIENCE * 50
    assert roster.deadline(9, 32) == 32 * UNKNOWN_SECONDS
    roster.begin("a", 2, 5, 32)
    roster.done("a", 5)
    assert roster.deadline(5, 32) == LEAST_SECONDS
    assert Roster(chunk_seconds=9.0).deadline(0, 32) == 9.0


def test_who_is_past_the_deadline_is_told_to_the_driver(roster: Roster, clock: Clock):
    seconds = roster.begin("a", 1, 0, 1)
    assert seconds is not None
    clock.now += seconds + 29
    assert roster.overview(30).overdue == ()
    clock.now += 2
    assert roster.overview(30).overdue == ("handle of a",)


def test_a_node_that_only_fails_is_left_out_and_one_success_clears_it(roster: Roster):
    for chunk in range(NODE_TROUBLES - 1):
        roster.begin("a", chunk, 0, 1)
        roster.left("a", "boom")
    roster.begin("a", 100, 0, 1)
    roster.done("a", 0)
    assert roster.overview(30).unfit == {}
    for chunk in range(200, 200 + NODE_TROUBLES):
        roster.begin("a", chunk, 0, 1)
        roster.left("a", "boom")
    assert roster.overview(30).unfit == {"north": f"{NODE_TROUBLES} failures in a row, the last: boom"}
    assert not roster.enter("b", "north", None)
    assert roster.enter("c", "south", None)


def test_a_node_without_the_model_is_left_out_at_once(roster: Roster):
    roster.unfit("north", "corrupt")
    assert roster.overview(30).unfit == {"north": "corrupt"}


def test_a_node_where_a_worker_never_gets_ready_is_left_out_unless_others_do(roster: Roster):
    for node in ("south", "north"):
        for _ in range(START_TRIES):
            assert roster.enter(f"b in the {node}", node, None)
    assert roster.overview(30).unfit == {}
    roster.enter("b in the north", "north", None)  # a is ready there: something may be wrong with b alone
    assert not roster.enter("b in the south", "south", None)
    died = f"a worker process died {START_TRIES} times in a row while it loaded the model"
    assert roster.overview(30).unfit == {"south": died}


def test_a_start_that_succeeds_is_the_end_of_a_row_of_deaths(roster: Roster):
    for _ in range(2 * START_TRIES):
        roster.enter("b", "south", None)
        roster.enter("b", "south", None)
        roster.ready("b")
    assert roster.overview(30).unfit == {}


def test_a_stop_names_what_is_under_way_and_nothing_begins_until_the_next_pass(roster: Roster):
    roster.begin("a", 3, 0, 1)
    assert roster.stop() == [3]
    assert roster.begin("a", 4, 0, 1) is None
    roster.start_pass()
    assert roster.begin("a", 4, 0, 1) is not None


def test_a_roster_that_was_lost_starts_afresh_and_stops_nobody(clock: Clock):
    roster = Roster(clock=clock)
    seconds = roster.begin("known to the roster before", 4, 0, 2)
    assert seconds == 2 * UNKNOWN_SECONDS
    roster.done("known to the roster before", 0)
    roster.begin("known to the roster before", 5, 0, 2)
    clock.now += 1e6
    assert roster.overview(30).overdue == ()
