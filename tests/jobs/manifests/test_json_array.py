"""A .json file holds one array of objects or of prompts, read by the block like every other manifest."""

from __future__ import annotations

import gzip
import json

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import readers
from latentmill.jobs.manifests.manifest import open_manifest


def read(path):
    manifest = open_manifest([str(path)])
    batches = [batch for source in manifest.sources for batch in source.batches()]
    prompts = [prompt for batch in batches for prompt in batch.columns["prompt"]]
    return manifest, prompts, [number for batch in batches for number in batch.lines.tolist()], batches


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_and_prompts_are_rows_wherever_blocks_end(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    values = [
        {"prompt": "é [x], }", "seed": 12345, "tag": None},
        "two \u2028 lines",
        {"prompt": "c", "tag": [1, {"k": 2}]},
    ]
    (tmp_path / "m.json").write_text("\ufeff" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n\n")
    manifest, prompts, numbers, batches = read(tmp_path / "m.json")
    assert (manifest.own, manifest.carried.names) == (("prompt", "seed"), ["tag"])
    assert prompts == ["é [x], }", "two \u2028 lines", "c"]
    assert numbers == [1, 2, 3]
    assert [seed for batch in batches for seed in batch.columns["seed"]] == [12345, None, None]


def test_a_compressed_array_is_read_too(tmp_path):
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(b'["a", "b"]'))
    assert read(tmp_path / "m.json.gz")[1] == ["a", "b"]


def test_members_of_other_kinds_are_bad_rows_only(tmp_path):
    (tmp_path / "m.json").write_text('["a", 12, [1], null, {"prompt": "b"}]')
    _, _, numbers, batches = read(tmp_path / "m.json")
    assert numbers == [1, 2, 3, 4, 5]
    assert sorted(batches[0].faults) == [1, 2, 3]
    assert "the array holds int" in batches[0].faults[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}', "name it .jsonl"),
        ('["a", {"prompt": "b"}', "after its row 2"),
        ('["a", {"prompt": }]', "row 2 that is not JSON"),
        ('["a"', "after its row 1"),
        ('["a",', "row 2 that is not JSON"),
        ('["a"] ["b"]', "goes on after its array"),
        ("[]", "no column 'prompt'"),
        ('["' + "x" * 3_000, "row 1 that is not JSON, or longer than 1,000"),
    ],
)
def test_what_is_no_such_array_is_refused_in_one_line(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UsageError, match=words.replace(".", r"\.")) as caught:
        read(tmp_path / "m.json")
    assert "\n" not in str(caught.value)
