"""`--filter`: what it keeps, and that nothing in it is ever run."""

from __future__ import annotations

import pyarrow as pa
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.exports.filters import parse_filter

ROWS = pa.table(
    {
        "prompt": ["a cat", "a dog", "a cat and a dog", "nothing"],
        "seed": pa.array([1, 2, 3, 4], pa.uint32()),
        "guidance_scale": pa.array([3.3, 5, 7.5, 3.3], pa.float32()),
        "score": pa.array([0.1, None, 0.3, 0.4], pa.float32()),
        "nice": [True, False, None, True],
        "tags": [["x"], [], None, ["y"]],
    }
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("seed == 1", [1]),
        ("seed != 1 and seed < 4", [2, 3]),
        ("1 < seed <= 3", [2, 3]),
        ("2 >= seed", [1, 2]),
        ("seed > -1", [1, 2, 3, 4]),
        ("guidance_scale == 3.3", [1, 4]),
        ("guidance_scale in [3.3, 5]", [1, 2, 4]),
        ("guidance_scale not in (3.3, 5)", [3]),
        ("'cat' in prompt", [1, 3]),
        ("'cat' not in prompt or seed == 1", [1, 2, 4]),
        ("prompt in {'a cat', 'a dog'}", [1, 2]),
        ("score < 0.35", [1, 3]),
        ("not score < 0.35", [4]),
        ("not (score < 0.35 or nice)", []),
        ("score is None", [2]),
        ("score is not None and not nice", []),
        ("nice", [1, 4]),
        ("not nice", [2]),
        ("nice == True", [1, 4]),
        ("seed > guidance_scale", [4]),
    ],
)
def test_a_filter_keeps_the_rows_for_which_it_holds(text: str, kept: list[int]):
    mask = parse_filter(text, ROWS.schema).mask(ROWS)
    assert ROWS.filter(mask).column("seed").to_pylist() == kept


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nsfw_scor < 1 and scre > 2", "there is no column 'nsfw_scor'; known: prompt, seed"),
        ("scre > 2", "there is no column 'scre', did you mean 'score'?; known: prompt, seed, guidance_scale"),
        ("prompt < 3", "column 'prompt' is of type string, and cannot be compared so"),
        ("seed == 'x'", "column 'seed' is of type uint32, and cannot be compared so"),
        ("seed in ['x']", "column 'seed' is of type uint32"),
        ("'x' in seed", "column 'seed' is of type uint32"),
        ("tags == 1", "column 'tags' is of type list"),
        ("seed", "'seed' is not true or false"),
        ("seed + 1 > 2", "'seed + 1' is compared with no column"),
        ("prompt.upper() == 'X'", "'prompt.upper()' is compared with no column"),
        ("__import__('os').system('true') == 0", "there is no column '__import__'"),
        ("(lambda: seed)() == 1", "is compared with no column"),
        ("[seed for seed in [1]] == 1", "is compared with no column"),
        ("seed < -prompt", "'-prompt' is neither a column nor a constant"),
        ("1 < 2", "'1' is compared with no column"),
        ("seed == None", "None is compared by `is None` or `is not None`"),
        ("seed is 3", "`is` and `is not` are followed by None"),
        ("seed <", "is not understood: invalid syntax; it takes columns, numbers"),
        ("seed = 3", "is not understood"),
        ("", "is not understood"),
        ("seed > 1" + " and seed > 1" * 400, "it has more than 4,096 letters"),
        ("(" * 1000 + "seed > 1" + ")" * 1000, "nested"),
        ("seed == " + "9" * 4000, "column 'seed'"),
        ("seed == '\0'", "null bytes"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(text: str, error: str):
    with pytest.raises(UsageError) as refused:
        parse_filter(text, ROWS.schema)
    assert error in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("filter ")
