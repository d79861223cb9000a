"""Row sizes and digests depend on values alone, not on how Arrow holds them."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.manifests.columns import can_carry, row_bytes, schema_digest, to_plain, update_digest

COLUMNS = {
    "text": pa.array(["a", None, "", "ünï", "long " * 9]),
    "large": pa.array(["a", None, "", "b", "c"], pa.large_string()),
    "binary": pa.array([b"a", None, b"", b"\xff", b"x"]),
    "int": pa.array([1, None, -3, 4, 5]),
    "float": pa.array([1.5, None, float("nan"), -0.0, 2.0], pa.float32()),
    "bool": pa.array([True, None, False, True, True]),
    "null": pa.nulls(5),
    "time": pa.array([datetime.datetime(2026, 1, day) for day in range(1, 6)], pa.timestamp("ns")),
    "decimal": pa.array([decimal.Decimal("1.5"), None, decimal.Decimal(2), None, None], pa.decimal128(5, 2)),
    "fixed": pa.array([b"abcd", None, b"efgh", b"ijkl", b"mnop"], pa.binary(4)),
    "list": pa.array([[1, 2], None, [], [3], [None]]),
    "texts": pa.array([["a", None], None, [], ["b"], ["cc", "d"]]),
    "vector": pa.array([[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], pa.list_(pa.float32(), 2)),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}, {"a": 3, "b": None}, {"a": 4, "b": "z"}]),
}


def digest(array):
    sha = hashlib.sha256()
    update_digest(sha, array)
    return sha.hexdigest()


def through_parquet(array):
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": array}), sink, row_group_size=2)
    return pq.read_table(io.BytesIO(sink.getvalue())).column("x").combine_chunks()


@pytest.mark.parametrize("name", COLUMNS)
def test_digest_and_size_survive_slicing_concatenation_and_parquet(name):
    array = COLUMNS[name]
    padded = pa.concat_arrays([array.slice(3), array, array.slice(0, 2)])
    variants = [padded.slice(2, 5), pa.concat_arrays([array.slice(0, 2), array.slice(2)]), through_parquet(array)]
    sizes = row_bytes(pa.record_batch({"x": array}))
    assert can_carry(array.type)
    for variant in variants:
        assert variant.to_pylist().__repr__() == array.to_pylist().__repr__()
        assert digest(variant) == digest(array)
        np.testing.assert_array_equal(row_bytes(pa.record_batch({"x": variant})), sizes)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "null"])
def test_digest_sees_every_value(name):
    array = COLUMNS[name]
    seen = {digest(array)}
    for index in range(len(array)):
        changed = pa.concat_arrays([array.slice(0, index), pa.nulls(1, array.type), array.slice(index + 1)])
        swapped = array.take(pa.array([index, *(i for i in range(5) if i != index)]))
        for variant in (changed, swapped):
            if repr(variant.to_pylist()) != repr(array.to_pylist()):
                assert digest(variant) not in seen
    assert digest(array.slice(0, 4)) not in seen


def test_texts_that_join_to_the_same_bytes_differ():
    assert digest(pa.array(["ab", "c"])) != digest(pa.array(["a", "bc"]))
    assert digest(pa.array(["a", None])) != digest(pa.array(["a", ""]))
    assert digest(pa.array([1])) != digest(pa.array([1.0]))


def test_what_lies_under_a_null_does_not_count():
    one = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.array([7, 8]).buffers()[1]])
    two = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.array([7, 9]).buffers()[1]])
    assert one.to_pylist() == two.to_pylist() == [7, None]
    assert digest(one) == digest(two)


def test_known_digests_do_not_move():
    """A changed digest would orphan every plan that exists."""
    assert digest(COLUMNS["text"])[:16] == "08ceb8a7220bf404"
    assert digest(COLUMNS["int"])[:16] == "e724cb82315284c1"
    assert schema_digest(pa.schema([("a", pa.string()), ("b", pa.list_(pa.int64()))]))[:16] == "cbde28d5bd02523c"


def test_encodings_become_plain():
    assert to_plain(pa.array(["a", "b"]).dictionary_encode()).type == pa.string()
    assert to_plain(pa.array(["a"], pa.string_view())).type == pa.string()
    assert not can_carry(pa.map_(pa.string(), pa.int8()))


def test_a_size_is_that_of_the_values():
    batch = pa.record_batch({"t": ["", "four"], "l": [[1, 2, 3], []], "n": pa.array([1, None], pa.int16())})
    assert row_bytes(batch).tolist() == [4 + 4 + 24 + 2, 8 + 4 + 2]
