"""Tar files, as the library webdataset and a DataLoader of torch read them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.exports.conftest import Write
from tests.jobs.exports.consumers import told_by

pytestmark = pytest.mark.long

READ_SAMPLES = """
import hashlib, json, sys, webdataset
samples = [
    [sample["__key__"], sample["txt"].decode(), json.loads(sample["json"]), hashlib.sha256(sample["png"]).hexdigest()]
    for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False)
]
print(json.dumps(samples))
"""
READ_BATCHES = """
import json, sys, webdataset
from torch.utils.data import DataLoader
dataset = webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode("torchrgb").to_tuple(sys.argv[2], "txt")
print(json.dumps([[list(pictures.shape), prompts] for pictures, prompts in DataLoader(dataset, batch_size=3)]))
"""


@pytest.mark.slow
def test_webdataset_gives_each_picture_with_its_row_and_its_prompt(
    write: Write, published: Path, ok: list[dict[str, Any]], tmp_path: Path
):
    write("webdataset", shard_size="4")
    samples = told_by(READ_SAMPLES, f"{tmp_path}/export/{{000000..000001}}.tar")
    assert [(key, prompt) for key, prompt, _, _ in samples] == [(row["sample_id"], row["prompt"]) for row in ok]
    assert [digest for *_, digest in samples] == [
        hashlib.sha256((published / row["image"]).read_bytes()).hexdigest() for row in ok
    ]
    told = [row for _, _, row, _ in samples]
    for name in ("seed", "tags", "sha256", "clip_score", "file_name"):
        assert [row[name] for row in told] == [row[name] for row in ok]
    assert all(row["sha256"] == row["exported_sha256"] for row in told)
    assert not any("image" in row for row in told)


@pytest.mark.slow
def test_a_dataloader_of_torch_takes_them_in_batches(write: Write, ok: list[dict[str, Any]], tmp_path: Path):
    write("webdataset", shard_size="2", image_format="webp")
    batches = told_by(READ_BATCHES, f"{tmp_path}/export/{{000000..000002}}.tar", "webp")
    assert [shape for shape, _ in batches] == [[3, 3, 64, 64]] * 2
    assert [prompt for _, prompts in batches for prompt in prompts] == [row["prompt"] for row in ok]


def test_splits_lie_in_folders_of_their_own(write: Write, tmp_path: Path):
    summary = write("webdataset", split="train=0.5,test=0.5")
    assert set(summary.rows) == {"train", "test"}
    tars = [path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").glob("*/*.tar")]
    assert sorted(tars) == ["test/000000.tar", "train/000000.tar"]
