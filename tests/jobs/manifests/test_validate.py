"""Row validation: what is kept, what is rejected, and the reason given."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import FIELDS
from latentmill.jobs.manifests.readers import RowBatch
from latentmill.jobs.manifests.rules import Rules
from latentmill.jobs.manifests.tokens import TokenCounter
from latentmill.jobs.manifests.validate import check_job, snapshot_schema, validate

DEFAULTS = {
    "negative_prompt": "", "seed": 42, "width": 256, "height": 256, "num_inference_steps": 20, "guidance_scale": 4.0,
    "sampler": "ddim", "eta": 0.0, "num_images": 1,
}  # fmt: skip


def steps_fault(sampler, steps):
    return f"{sampler} takes no {steps} steps" if (sampler, steps) in {("plms", 3), ("ddim", 7)} else None


def rules(defaults=(), axes=(), min_pixels=65_536, tokens=None):
    return Rules(
        factor=8,
        min_pixels=min_pixels,
        steps_fault=steps_fault,
        defaults=DEFAULTS | dict(defaults),
        axes=dict(axes),
        tokens=tokens,
    )


def check(columns, *, offset=0, with_rules=None, carried=(), faults=()):
    count = len(next(iter(columns.values())))
    batch = RowBatch(lines=np.arange(1, count + 1), columns=columns, faults=dict(faults))
    own = tuple(name for name in FIELDS if name in columns)
    return validate(batch, offset, snapshot_schema(own, pa.schema(list(carried))), with_rules or rules())


def reason_of(column, value, *, arrow=False, **more):
    values = [value, None]
    columns = {"prompt": ["bad", "good"], column: pa.array(values) if arrow else values}
    checked = check(columns, **more)
    assert [reject.row_number for reject in checked.rejects] == [1]
    assert checked.kept.column("row_number").to_pylist() == [2]
    return checked.rejects[0].reason


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("seed", -1, "seed -1 is outside 0..4294967295"),
        ("seed", 2**32, "seed 4294967296 is outside"),
        ("seed", 10**30, "is outside 0..4294967295"),
        ("seed", 1.5, "seed 1.5 is not a whole number"),
        ("seed", "1e400", "seed inf is outside"),
        ("seed", True, "seed True is not a whole number"),
        ("seed", "four", "seed 'four' is not a whole number"),
        ("seed", [1], "seed [1] is not a whole number"),
        ("width", 260, "width 260 is not a multiple of 8, the model's factor; use 256 or 264"),
        ("width", 4, "use 8"),
        ("height", 8192, "height 8192 is outside 1..4096"),
        ("height", 0, "height 0 is outside 1..4096"),
        ("width", 128, "size 128x256 is too small for the watermark"),
        ("num_inference_steps", 0, "num_inference_steps 0 is outside 1..1000"),
        ("num_inference_steps", 1001, "outside 1..1000"),
        ("guidance_scale", float("inf"), "guidance_scale inf is outside 0..100"),
        ("guidance_scale", -0.1, "guidance_scale -0.1 is outside 0..100"),
        ("guidance_scale", "nan", "guidance_scale nan is outside 0..100"),
        ("eta", 1.01, "eta 1.01 is outside 0..1"),
        ("sampler", "DDIM", "sampler 'DDIM' is unknown"),
        ("sampler", 3, "sampler is 3, expected text"),
        ("num_images", 0, "num_images 0 is outside 1..1000"),
        ("negative_prompt", "a\0b", "negative_prompt holds a NUL character"),
        ("negative_prompt", "é" * 8193, "negative_prompt has 16,386 bytes, the limit is 16,384"),
        ("negative_prompt", "\ud800", "negative_prompt holds a lone surrogate"),
        ("negative_prompt", 5, "negative_prompt is 5, expected text"),
        ("id", "\udcff", "id holds a lone surrogate or bytes that are not UTF-8"),
        ("id", 1.5, "id is 1.5, expected text"),
    ],
)
def test_a_bad_value_is_rejected_with_its_reason(column, value, words):
    reason = reason_of(column, value)
    assert words in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "prompt is missing"),
        ("a\0", "prompt holds a NUL"),
        ("x" * 16_385, "prompt has 16,385 bytes"),
        ("\udc80", "UTF-8"),
        (7, "prompt is 7, expected text"),
        (b"x", "expected text"),
    ],
)
def test_a_bad_prompt_is_rejected_with_its_reason(prompt, words):
    checked = check({"prompt": ["fine", prompt]}, offset=10)
    assert [(reject.line, reject.row_number) for reject in checked.rejects] == [(2, 12)]
    assert words in checked.rejects[0].reason
    assert len(checked.rejects[0].excerpt) <= 200
    checked.rejects[0].excerpt.encode()


@pytest.mark.parametrize("prompt", ["", " ", "x" * 16_384, "\x1b[31m\u202e<b>", "😀", "=cmd|x"])
def test_strange_but_sound_prompts_are_kept_raw(prompt):
    assert check({"prompt": [prompt]}).kept.column("prompt").to_pylist() == [prompt]


def test_arrow_columns_are_checked_like_lists():
    assert "outside" in reason_of("seed", 2**40, arrow=True)
    huge = check({"prompt": ["a"], "seed": pa.array([2**63], pa.uint64())})
    assert "seed 9223372036854775808 is outside" in huge.rejects[0].reason
    assert "not a whole number" in reason_of("width", 256.5, arrow=True)
    columns = {"prompt": ["a", "b"], "seed": pa.array([3.0, float("nan")]), "id": pa.array([7, None])}
    kept = check(columns).kept
    assert kept.column("seed").to_pylist() == [3, None]
    assert kept.column("row_id").to_pylist() == ["7", "2"]


def test_text_of_arrow_that_is_not_utf8_is_rejected_row_by_row():
    broken = pa.array([b"ok", b"\xff\xfe", b"fine"]).view(pa.string())
    checked = check({"prompt": broken})
    assert checked.kept.column("prompt").to_pylist() == ["ok", "fine"]
    assert "not UTF-8" in checked.rejects[0].reason
    assert checked.rejects[0].excerpt == "\\udcff\\udcfe"
    checked = check({"prompt": ["a", "b", "c"], "tag": broken}, carried=[("tag", pa.string())])
    assert [reject.row_number for reject in checked.rejects] == [2]
    assert "'tag'" in checked.rejects[0].reason


def test_a_reason_for_each_bad_column_and_none_twice():
    checked = check({"prompt": ["a"], "seed": ["x"], "width": ["y"]})
    assert checked.rejects[0].reason.count(";") == 3
    assert len(checked.kept) == 0


def test_rows_that_a_reader_gave_up_have_one_reason():
    checked = check({"prompt": [None, "b"]}, faults={0: "the line is not JSON"})
    assert [reject.reason for reject in checked.rejects] == ["the line is not JSON"]


def test_pairs_are_checked_with_defaults_and_axes():
    assert "eta 0.5 does not go with sampler plms" in reason_of("eta", 0.5, with_rules=rules({"sampler": "plms"}))
    assert "plms" in reason_of("eta", 0.5, with_rules=rules(axes={"sampler": ("ddim", "plms")}))
    assert "plms" in reason_of("sampler", "plms", with_rules=rules(axes={"eta": (0.0, 0.5)}))
    assert "euler_a" in reason_of("sampler", "euler_a", with_rules=rules({"eta": 0.5}))
    assert "plms takes no 3 steps" in reason_of("num_inference_steps", 3, with_rules=rules({"sampler": "plms"}))
    assert "plms takes no 3 steps" in reason_of(
        "sampler", "plms", with_rules=rules(axes={"num_inference_steps": (3, 4)})
    )
    both = check({"prompt": list("abc"), "sampler": ["ddim", "plms", "plms"], "num_inference_steps": [3, 3, 7]})
    assert [reject.row_number for reject in both.rejects] == [2]
    assert "runs past 4294967295" in reason_of("seed", 2**32 - 1, with_rules=rules({"num_images": 2}))
    assert "runs past" in reason_of("num_images", 3, with_rules=rules(axes={"seed": (1, 2**32 - 2)}))
    assert "too small" in reason_of("width", 248, with_rules=rules(axes={"height": (256, 512)}))
    small = check({"prompt": ["a"], "width": [8]}, with_rules=rules(min_pixels=0))
    assert len(small.kept) == 1


@pytest.mark.parametrize(
    ("job", "own", "words"),
    [
        (rules({"width": 100}), (), "width 100 is not a multiple of 8"),
        (rules({"width": 64}), (), "size 64x256 is too small"),
        (rules({"sampler": "plms", "eta": 0.1}), (), "eta 0.1 does not go with sampler plms"),
        (rules(axes={"sampler": ("plms",)}, defaults={"eta": 0.1}), ("sampler",), "does not go"),
        (rules({"num_inference_steps": 7}), ("prompt",), "ddim takes no 7 steps"),
        (rules(axes={"sampler": ("ddim", "plms"), "num_inference_steps": (3,)}), (), "plms takes no 3 steps"),
        (rules(axes={"width": (256, 100)}), ("width",), "sweep axis width: width 100 is not a multiple"),
        (rules(axes={"width": (64,), "height": (64,)}), ("width", "height"), "size 64x64 is too small"),
    ],
)
def test_what_no_row_can_mend_is_refused_before_rows_are_read(job, own, words):
    with pytest.raises(UsageError, match=words):
        check_job(job, own)


def test_what_rows_can_mend_is_left_to_them():
    check_job(rules({"width": 100}), ("width",))
    check_job(rules({"sampler": "plms", "eta": 0.1}), ("eta",))
    check_job(rules({"num_inference_steps": 7}), ("sampler",))


class Words:
    def count(self, texts):
        return [len(text.split()) for text in texts]


def counter(negatives=(), default=""):
    return TokenCounter(Words, syntax="a1111", limit=3, negatives=negatives, default_negative=default)


def test_texts_over_the_limit_are_rejected_where_that_is_an_error():
    tokens = counter()
    long = "a b (c d)"
    columns = {
        "prompt": ["a b (c:1.5)", long, "x", long],
        "negative_prompt": [None, None, long, "y"],
        "seed": [1, 1, 1, -1],
    }
    checked = check(columns, with_rules=rules(tokens=tokens))
    assert [reject.row_number for reject in checked.rejects] == [2, 3, 4]
    assert checked.rejects[0].reason.startswith("prompt has 4 tokens, the limit is 3; shorten it, or use long_prompts")
    assert checked.rejects[1].reason.startswith("negative_prompt has 4 tokens")
    assert "seed -1" in checked.rejects[2].reason
    assert tokens.refused == 2
    swept = rules(tokens=counter(), axes={"negative_prompt": ("x", long)})
    with pytest.raises(UsageError, match="sweep axis negative_prompt: negative_prompt has 4 tokens, the limit is 3"):
        check_job(swept, ())
    fits = rules(tokens=counter(), axes={"negative_prompt": ("x", "y")}, defaults={"negative_prompt": long})
    assert len(check({"prompt": ["a"], "negative_prompt": [long]}, with_rules=fits).kept) == 1
    check_job(fits, ("negative_prompt",))


def test_the_longest_text_of_a_row_counts():
    rows = pa.RecordBatch.from_pydict({"prompt": ["a", "a b c"], "negative_prompt": [None, "a b c d e"]})
    assert counter(default="a b").longest(rows) == [2, 5]
    assert counter(negatives=["a", "a b c d"], default="a b c d e f").longest(rows) == [4, 4]
    assert counter(default="a b").longest(rows.select(["prompt"])) == [2, 3]


def test_fast_and_slow_paths_agree():
    values = ["1", " 2 ", "3.0", "", "x", "-5", "4294967295", None]
    slow = check({"prompt": ["p"] * len(values), "seed": [value if value else None for value in values]})
    each = [check({"prompt": ["p"], "seed": [value if value else None]}) for value in values]
    assert slow.kept.column("seed").to_pylist() == [
        seed for one in each for seed in one.kept.column("seed").to_pylist()
    ]
    assert [reject.reason for reject in slow.rejects] == [reject.reason for one in each for reject in one.rejects]
