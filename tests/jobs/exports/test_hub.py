"""A folder for the Hugging Face hub, as `datasets` and mlcroissant read it; the way there, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.exports import card
from latentmill.jobs.exports.export import export
from latentmill.jobs.exports.push import push_to_hub
from latentmill.jobs.exports.spec import make_export_spec
from tests.jobs.driver import job_spec, run
from tests.jobs.exports.conftest import Write
from tests.jobs.exports.consumers import told_by

pytestmark = pytest.mark.long

LOAD = """
import datasets, hashlib, json, sys
streaming = len(sys.argv) > 3
loaded = datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2], streaming=streaming)
told = {"kind": [type(split).__name__ for split in loaded.values()]}
for name, split in loaded.items():
    told[name] = [
        [row["sample_id"], row["prompt"], row["tags"],
         hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest()]
        for row in split
    ]
print(json.dumps(told))
"""
READ_CROISSANT = """
import hashlib, json, mlcroissant, sys
dataset = mlcroissant.Dataset(sys.argv[1])
errors = sorted(dataset.metadata.ctx.issues.errors)
told = {"errors": errors}
for split in sys.argv[2:]:
    told[split] = [
        [row[f"{split}/prompt"].decode(), row[f"{split}/seed"],
         hashlib.sha256(row[f"{split}/image"].convert("RGB").tobytes()).hexdigest()]
        for row in dataset.records(split)
    ]
print(json.dumps(told))
"""


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    write("hf", shard_size="2", split="train=0.5,test=0.5", image_format="webp")
    return tmp_path / "export"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streaming"])
def test_load_dataset_gives_pictures_and_columns(
    streaming: bool, folder: Path, ok: list[dict[str, Any]], tmp_path: Path
):
    told = told_by(LOAD, folder, tmp_path / "cache", *(["streaming"] if streaming else []))
    assert set(told.pop("kind")) == {"IterableDataset" if streaming else "Dataset"}
    assert told.keys() == {"train", "test"}
    assert sorted(row for rows in told.values() for row in rows) == [
        [row["sample_id"], row["prompt"], row["tags"], row["pixel_sha256"]] for row in ok
    ]


@pytest.mark.slow
def test_croissant_metadata_is_valid_and_leads_to_every_row(folder: Path, ok: list[dict[str, Any]]):
    told = told_by(READ_CROISSANT, folder / "croissant.json", "train", "test")
    assert told.pop("errors") == []
    assert sorted((row for rows in told.values() for row in rows), key=lambda row: row[1]) == [
        [row["prompt"], row["seed"], row["pixel_sha256"]] for row in ok
    ]


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_has_the_facts_of_the_job(folder: Path):
    front, text = front_matter(folder)
    assert "license" not in front
    assert front["size_categories"] == ["n<1K"]
    sizes = front["dataset_info"]["splits"]
    assert sum(split["num_examples"] for split in sizes) == 6
    for split in sizes:
        files = (folder / "data").glob(f"{split['name']}-*.parquet")
        assert split["num_bytes"] == sum(path.stat().st_size for path in files)
    for fact in ("6 ok, 1 flagged, 1 failed", "8 samples of 8 prompts", "no invisible watermark", "`tiny`"):
        assert fact in text


def test_a_license_that_the_preset_names_and_the_mark_are_in_the_card(manifest, tmp_path: Path):
    marked = {
        "width": 256,
        "height": 256,
        "watermark": "dwtDct",
        "watermark_text": "it's `mine`\n# not a heading",
        "safety": "none",
    }
    run(job_spec("embedded", manifest(2), tmp_path / "out", **marked))
    export(str(tmp_path / "out"), make_export_spec({"to": "hf", "out": str(tmp_path / "hf")}))
    front, text = front_matter(tmp_path / "hf")
    assert front["license"] == "apache-2.0"
    assert "invisible watermark `it's 'mine' # not a heading` by `dwtDct`" in text
    assert text.count("\n# ") == 1


def test_without_a_token_nothing_is_pushed_and_one_line_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UsageError, match="there is no token for the Hugging Face hub; set HF_TOKEN, or log in"):
        push_to_hub(str(folder), "me/birds")


def test_only_a_finished_export_on_a_disk_is_pushed_to_a_name_of_the_hub(folder: Path, tmp_path: Path):
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "_export/export.json").unlink()
    for place, repo, error in (
        (folder, "birds", "repository 'birds' is not OWNER/NAME"),
        (unfinished, "me/birds", "is not finished; run the same `latentmill export` command again"),
        (tmp_path, "me/birds", "holds no export"),
        ("s3://bucket/export", "me/birds", "is not on a disk"),
    ):
        with pytest.raises(UsageError, match=error):
            push_to_hub(str(place), repo)


def test_a_finished_export_is_pushed_by_one_commit_with_the_token(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub's own client, up to the calls by which it asks the hub."""
    calls: list[tuple[str, str, dict[str, Any]]] = []

    def noted(verb: str, answer: Any) -> Any:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            calls.append((verb, self.token, {**named, "arguments": arguments}))
            return answer

        return call

    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", noted("create_repo", "https://hub/datasets/me/birds"))
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", noted("create_commit", None))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", noted("upload_folder", None))
    (folder / "data/.half.tmp").write_bytes(b"half")
    summary = push_to_hub(str(folder), "me/birds", private=True)
    assert (summary.repo, summary.url) == ("me/birds", "https://hub/datasets/me/birds")
    assert [(verb, token) for verb, token, _ in calls] == [("create_repo", "hf_mine"), ("upload_folder", "hf_mine")]
    made, uploaded = (named for *_, named in calls)
    assert (made["private"], made["exist_ok"], made["repo_type"]) == (True, True, "dataset")
    assert (uploaded["folder_path"], uploaded["repo_type"]) == (str(folder), "dataset")
    from huggingface_hub.utils import filter_repo_objects

    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(names, ignore_patterns=uploaded["ignore_patterns"]))
    assert set(names) - sent == {"data/.half.tmp"}


def test_a_hub_that_does_not_answer_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(JobError) as failed:
        push_to_hub(str(folder), "me/birds")
    assert str(failed.value).startswith("me/birds on the hub: ")
    assert "\n" not in str(failed.value)
    assert "hf_none" not in str(failed.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CreativeML OpenRAIL++-M", {"license": "openrail++"}),
        (
            "Stability AI Community License",
            {"license": "other", "license_name": "stability-ai-community-license"},
        ),
    ],
)
def test_a_license_is_named_as_the_hub_names_it(name: str, told: dict[str, str]):
    assert card._license(name) == told
