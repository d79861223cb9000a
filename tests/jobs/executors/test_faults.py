"""What is held against chunks and nodes, and how long a chunk may take."""

from __future__ import annotations

import pytest

from latentmill.jobs.executors.faults import (
    LEAST_SECONDS,
    NODE_FAULTS,
    PATIENCE,
    POOLED_TRIES,
    START_TRIES,
    UNKNOWN_SECONDS,
    Faults,
)


@pytest.fixture
def faults() -> Faults:
    return Faults()


def test_a_chunk_that_broke_its_worker_twice_is_suspect(faults: Faults):
    for _ in range(POOLED_TRIES):
        assert not faults.is_suspect(7)
        faults.blame(7)
    assert faults.is_suspect(7)
    assert not faults.is_suspect(8)


def test_deadlines_follow_what_chunks_of_one_pace_take(faults: Faults):
    assert faults.deadline(0, 32) == 32 * UNKNOWN_SECONDS
    faults.note_done("north", 0, 50.0)
    faults.note_done("north", 0, 20.0)
    assert faults.deadline(0, 32) == PATIENCE * 50
    assert faults.deadline(9, 32) == 32 * UNKNOWN_SECONDS
    faults.note_done("north", 5, 0.0)
    assert faults.deadline(5, 32) == LEAST_SECONDS
    assert Faults(9.0).deadline(0, 32) == 9.0


def test_a_node_that_only_fails_is_left_out_and_one_success_clears_it(faults: Faults):
    for _ in range(NODE_FAULTS - 1):
        faults.note_failure("north", "boom")
    faults.note_done("north", 0, 1.0)
    for _ in range(NODE_FAULTS - 1):
        faults.note_failure("north", "boom")
    assert faults.unfit == {}
    faults.note_failure("north", "bang")
    assert faults.unfit == {"north": f"{NODE_FAULTS} failures in a row, the last: bang"}


def test_a_node_where_a_worker_never_gets_ready_is_left_out(faults: Faults):
    for times in range(1, START_TRIES):
        faults.note_stillborn("south", times)
    assert faults.unfit == {}
    faults.note_stillborn("south", START_TRIES)
    assert faults.unfit == {"south": f"a worker process died {START_TRIES} times in a row while it loaded the model"}
