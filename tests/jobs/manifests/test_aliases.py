"""Columns that are misspelled or that other programs name differently: known, accepted on request, never silent."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.aliases import ALIASES, alias_of, flag_meant_by, meant_by, one_edit
from latentmill.jobs.manifests.fields import FIELDS
from latentmill.jobs.manifests.manifest import open_manifest
from latentmill.jobs.spec import SETTINGS

ROWS = [{"caption": "a", "steps": 3, "CFG scale": 4.5, "W": 64, "tag": "x"}]


def encode(rows, suffix):
    if suffix == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if suffix in {"json", "jsonl"}:
        return json.dumps(rows if suffix == "json" else rows[0]).encode()
    return "\n".join(",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]).encode()


def write(tmp_path, rows, suffix="csv"):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(encode(rows, suffix))
    return str(path)


def test_every_alias_stands_for_a_setting_and_is_none_itself():
    assert set(ALIASES.values()) <= SETTINGS.keys() | FIELDS.keys()
    assert set(ALIASES) & (SETTINGS.keys() | FIELDS.keys()) == {"prompts"}  # a key of job files, and a column elsewhere


@pytest.mark.parametrize(
    ("column", "parameter"),
    [
        ("steps", "num_inference_steps"), ("cfg", "guidance_scale"), ("CFG-Scale", "guidance_scale"), ("H", "height"),
        ("num_images_per_prompt", "num_images"), ("ddim_eta", "eta"), ("Negative Prompt", "negative_prompt"),
        ("ID", "id"), ("caption", "prompt"), ("sede", None), ("h", None), ("mood", None), ("mode", None),
    ],
)  # fmt: skip
def test_names_from_elsewhere_are_known(column, parameter):
    assert alias_of(column) == parameter


@pytest.mark.parametrize(
    ("column", "parameter"),
    [
        ("sede", "seed"), ("seeds", "seed"), ("stpes", "num_inference_steps"), ("widht", "width"),
        ("steps", "num_inference_steps"),
        ("negativ_prompt", "negative_prompt"), ("guidence_scale", "guidance_scale"),
        ("weight", None), ("sample", None), ("meta", None), ("is", None), ("tag", None), ("author", None),
    ],
)  # fmt: skip
def test_one_edit_is_a_misspelling_and_an_ordinary_word_is_none(column, parameter):
    assert meant_by(column) == parameter


def test_an_edit_is_one_letter_or_two_neighbours_exchanged():
    assert all(one_edit(*pair) for pair in [("seed", "sede"), ("seed", "seeed"), ("seed", "sed"), ("seed", "sead")])
    assert not any(one_edit(*pair) for pair in [("seed", "seed"), ("seed", "deed s"), ("seed", "dees"), ("ab", "cd")])


def test_flags_from_elsewhere_are_known():
    meant = {flag: flag_meant_by(flag) for flag in ("--steps", "--cfg", "--scale", "--neg", "--n", "--output", "--x")}
    assert meant == {
        "--steps": "--num-inference-steps",
        "--cfg": "--guidance-scale",
        "--scale": "--guidance-scale",
        "--neg": "--negative-prompt",
        "--n": "--num-images",
        "--output": "--out",
        "--x": None,
    }


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_aliases_are_read_as_what_they_stand_for_where_the_user_says_so(tmp_path, suffix):
    path = write(tmp_path, ROWS, suffix)
    with pytest.raises(UsageError, match=r"did you mean 'caption'\? Rename it, or say --accept-aliases"):
        open_manifest([path])
    manifest = open_manifest([path], accept_aliases=True)
    assert manifest.own == ("prompt", "width", "guidance_scale", "num_inference_steps")
    assert manifest.carried.names == ["tag"]
    assert manifest.suspects == ()
    (batch,) = [batch for batch in manifest.sources[0].batches() if len(batch)]
    columns = {name: [str(value) for value in values] for name, values in batch.columns.items()}
    assert columns == {
        "prompt": ["a"], "num_inference_steps": ["3"], "guidance_scale": ["4.5"], "width": ["64"], "tag": ["x"]
    }  # fmt: skip


def test_a_caption_beside_a_prompt_is_another_text(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "caption": "b"}])
    for accept in (False, True):
        manifest = open_manifest([path], accept_aliases=accept)
        assert (manifest.own, manifest.carried.names, manifest.suspects) == (("prompt",), ["caption"], ())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_two_columns_for_one_parameter_are_refused(tmp_path, suffix):
    path = write(tmp_path, [{"prompt": "a", "steps": 1, "ddim_steps": 2}], suffix)
    with pytest.raises(UsageError, match="'steps' and 'ddim_steps', which are both num_inference_steps"):
        open_manifest([path], accept_aliases=True)


def test_in_json_two_keys_for_one_parameter_cost_their_row_alone(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"prompt":"a","cfg":1,"scale":2}\n{"prompt":"b","cfg":3}\n{"prompt":"c","scale":4}\n'
    )
    (source,) = open_manifest([str(tmp_path / "m.jsonl")], accept_aliases=True).sources
    (batch,) = source.batches()
    assert batch.columns["guidance_scale"] == [None, 3, 4]
    assert list(batch.faults) == [0]
    assert "'cfg' and 'scale'" in batch.faults[0]


def test_suspects_are_named_once_with_their_file_and_what_they_may_mean(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,sede,cfg,mood\nx,1,2,3\n")
    (tmp_path / "b.csv").write_text("prompt,sede,guidance_scale\nx,1,2\n")
    suspects = open_manifest([str(tmp_path / "*.csv")]).suspects
    assert [(s.column, s.parameter, s.is_alias, s.beside) for s in suspects] == [
        ("sede", "seed", False, False),
        ("cfg", "guidance_scale", True, False),
    ]
    assert all(suspect.source.endswith("a.csv") for suspect in suspects)
