"""Which rows of two datasets are the same request, whatever their order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from latentmill.jobs.compare.matching import OUTCOME, REQUEST, Matching, match


def row(prompt: str, pixels: str | None = "a", **more: Any) -> dict[str, Any]:
    basis = {"negative_prompt": "", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 2}
    basis |= {"guidance_scale": 7.5, "sampler": "ddim", "eta": 0.0, "row_id": "0", "status": "ok"}
    basis |= {"model": "m", "loras": "", "init_image_sha256": None, "strength": None, "mask_sha256": None}
    return basis | {"prompt": prompt, "pixel_sha256": pixels} | more


def matched(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], *ignored: str, batch: int = 3):
    request = [column for name, column in REQUEST.items() if name not in ignored]

    def tables(rows: Sequence[dict[str, Any]]):
        names = (*request, *OUTCOME)
        for start in range(0, len(rows), batch):
            yield pa.Table.from_pylist([{name: each[name] for name in names} for each in rows[start : start + batch]])

    return told(match(tables(before), tables(after), request))


def told(found: Matching) -> dict[str, Any]:
    return {
        "identical": found.identical,
        "changed": [tuple(pair) for pair in found.changed.tolist()],
        "removed": found.removed.tolist(),
        "added": found.added.tolist(),
    }


def test_rows_are_the_same_changed_new_or_gone():
    before = [row("a"), row("b"), row("c")]
    after = [row("a"), row("b", "other"), row("d")]
    assert matched(before, after) == {"identical": 1, "changed": [(1, 1)], "removed": [2], "added": [2]}


def test_another_value_of_any_parameter_is_another_request():
    base = row("a")
    others = {"negative_prompt": "x", "seed": 2, "width": 72, "height": 72, "num_inference_steps": 3}
    others |= {"guidance_scale": 8.0, "sampler": "euler", "eta": 0.5, "prompt": "b", "model": "n"}
    others |= {"loras": "ink:0.5", "init_image_sha256": "d1", "strength": 0.5, "mask_sha256": "d2"}
    assert others.keys() == set(REQUEST.values())
    for name, value in others.items():
        found = matched([base], [base | {name: value}])
        assert found == {"identical": 0, "changed": [], "removed": [0], "added": [0]}, name
    ignored = matched([base], [base | {"guidance_scale": 8.0, "pixel_sha256": "z"}], "guidance_scale")
    assert ignored["changed"] == [(0, 0)]


def test_order_does_not_count():
    rows = [row(f"prompt {number}", row_id=str(number)) for number in range(100)]
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    assert matched(rows, shuffled)["identical"] == 100


def test_a_prompt_that_is_put_in_front_and_moves_all_row_numbers_is_one_new_row():
    before = [row(f"prompt {number}", row_id=str(number)) for number in range(7)]
    after = [row("new", row_id="0"), *(each | {"row_id": str(number + 1)} for number, each in enumerate(before))]
    assert matched(before, after) == {"identical": 7, "changed": [], "removed": [], "added": [0]}


def test_among_equal_requests_the_same_row_id_wins_then_their_order():
    before = [row("a", "1", row_id="x"), row("a", "2", row_id="y"), row("a", "3", row_id="z")]
    after = [row("a", "2", row_id="y"), row("a", "4", row_id="w"), row("a", "1", row_id="x"), row("a", "5", row_id="x")]
    assert matched(before, after) == {"identical": 2, "changed": [(2, 1)], "removed": [], "added": [3]}


def test_another_status_is_a_change_and_two_failures_are_none():
    failed = row("a", None, status="failed")
    assert matched([failed], [failed])["identical"] == 1
    assert matched([row("a")], [failed])["changed"] == [(0, 0)]
    assert matched([row("a")], [row("a", status="flagged")])["changed"] == [(0, 0)]


def test_datasets_in_one_order_keep_nothing_waiting(monkeypatch):
    from latentmill.jobs.compare import matching

    most = 0
    add = matching._Waiting.add

    def watched(self, each):
        nonlocal most
        add(self, each)
        most = max(most, len(self._rows))

    monkeypatch.setattr(matching._Waiting, "add", watched)
    rows = [row(f"prompt {number}") for number in range(1000)]
    assert matched(rows, rows, batch=10)["identical"] == 1000
    assert most == 10
