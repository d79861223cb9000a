"""What every export promises, whatever its form: whole shards, the same bytes, resumed, checked, refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.exports import documents, runners
from latentmill.jobs.exports.export import export
from latentmill.jobs.exports.rows import Selection
from latentmill.jobs.exports.spec import make_export_spec
from latentmill.jobs.exports.table import EXPORTS
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.publish import encode_part, load_publication, publish
from tests.jobs.driver import PROCESSES, job_spec, run
from tests.jobs.exports.conftest import Write, digests
from tests.jobs.outputs.repairs import repair
from tests.jobs.traps import KillAt, arm

pytestmark = pytest.mark.long

every_format = pytest.mark.parametrize("to", list(EXPORTS))


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """The dataset, to be damaged."""
    return shutil.copytree(published, tmp_path / "copy")


def spec_of(to: str, out: Path | str, **settings: Any):
    return make_export_spec({"to": to, "out": str(out), **settings})


@every_format
def test_the_same_export_twice_has_the_same_bytes_and_a_finished_one_is_left_alone(
    to: str, write: Write, tmp_path: Path
):
    settings = {"shard_size": "2", "split": "train=0.5,test=0.5"}
    first = write(to, tmp_path / "first", **settings)
    write(to, tmp_path / "second", workers=1, **settings)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert sum(first.rows.values()) == 6
    assert first.written == first.shards > 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")}
    again = write(to, tmp_path / "first", **settings)
    assert (again.written, again.files, again.bytes) == (0, first.files, first.bytes)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")} == times


@every_format
def test_every_file_has_the_digest_that_its_record_says(to: str, write: Write, tmp_path: Path):
    write(to, shard_size="4")
    found = digests(tmp_path / "export")
    records = [json.loads(path.read_text()) for path in (tmp_path / "export/_export/shards").rglob("*.json")]
    told = [file for record in records for file in record["files"]]
    told += json.loads((tmp_path / "export/_export/export.json").read_text())["last_files"]
    assert {file["path"]: file["sha256"] for file in told} == {
        path: digest for path, digest in found.items() if not path.startswith("_export/") or "captions" in path
    }


def _export_until(trap: KillAt, out: str, spec: Any) -> None:
    arm(trap)
    export(out, spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trap",
    [
        KillAt("after", "create", "_export/plan.json"),
        KillAt("before", "write", "images/", 3),
        KillAt("after", "write", "images/", 3),
        KillAt("before", "write", "_export/shards/"),
        KillAt("after", "write", "_export/shards/", 2),
        KillAt("before", "write", "annotations/"),
        KillAt("before", "write", "_export/export.json"),
    ],
    ids=lambda trap: f"{trap.when} {trap.verb} {trap.prefix}{trap.nth}",
)
def test_a_killed_export_goes_on_to_the_same_bytes(trap: KillAt, published: Path, write: Write, tmp_path: Path):
    spec = spec_of("coco-captions", tmp_path / "killed", shard_size="2", workers=1)
    process = PROCESSES.Process(target=_export_until, args=(trap, str(published), spec))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    assert not (tmp_path / "killed/_export/export.json").exists()
    there = len(list((tmp_path / "killed/_export/shards").rglob("*.json")))
    summary = export(str(published), spec)
    assert summary.written == summary.shards - there
    write("coco-captions", tmp_path / "calm", shard_size="2")
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")


@pytest.mark.parametrize("damage", ["gone", "cut short", "another byte"])
def test_what_was_damaged_meanwhile_is_written_again(damage: str, write: Write, tmp_path: Path):
    write("parquet", shard_size="2")
    before = digests(tmp_path / "export")
    file = tmp_path / "export/data/train-00001-of-00003.parquet"
    data = file.read_bytes()
    match damage:
        case "gone":
            file.unlink()
        case "cut short":
            file.write_bytes(data[:-1])
        case _:
            file.write_bytes(b"?" + data[1:])
            assert write("parquet", shard_size="2").written == 0  # sizes alone do not tell
    assert write("parquet", shard_size="2", verify=True).written == 1
    assert digests(tmp_path / "export") == before


def test_a_place_that_holds_something_else_is_refused(write: Write, tmp_path: Path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds something else \(thesis\.txt\); name an empty place with --out"):
        write("jsonl")
    assert digests(tmp_path / "export").keys() == {"thesis.txt"}


def test_other_options_and_another_dataset_are_refused_with_what_differs(
    write: Write, tiny_model: Path, manifest, tmp_path: Path
):
    write("jsonl")
    before = digests(tmp_path / "export")
    with pytest.raises(OutputConflictError, match="image_format is png there and webp here; name another --out"):
        write("jsonl", image_format="webp")
    with pytest.raises(OutputConflictError, match="to is jsonl there and csv here"):
        write("csv")
    run(job_spec(tiny_model, manifest(2), tmp_path / "other"))
    with pytest.raises(OutputConflictError, match="it was made from another dataset"):
        export(str(tmp_path / "other"), spec_of("jsonl", tmp_path / "export"))
    assert digests(tmp_path / "export") == before
    assert OutputConflictError.exit_code == 3


def test_another_version_of_what_writes_the_bytes_goes_on_with_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write("jsonl", shard_size="2")
    before = digests(tmp_path / "export")
    monkeypatch.setattr(documents, "version", lambda name: "99" if name.lower() == "pillow" else version(name))
    with pytest.raises(OutputConflictError, match=r"[Pp]illow is .* there and 99 here; name another --out"):
        write("jsonl", shard_size="2")
    assert digests(tmp_path / "export") == before


def test_an_export_is_not_gone_on_with_once_the_dataset_has_other_rows(copy: Path, tmp_path: Path):
    """Failed samples were made again in the meantime, and the dataset was published anew."""
    spec = spec_of("jsonl", tmp_path / "export", shard_size="2")
    export(str(copy), spec)
    (tmp_path / "export/_export/export.json").unlink()  # as if it had been killed
    before = digests(tmp_path / "export")
    assert repair(str(copy), 1)
    publish(open_job(str(copy)))
    with pytest.raises(
        OutputConflictError, match="the dataset was published again since, with other rows; name anothe"
    ):
        export(str(copy), spec)
    assert digests(tmp_path / "export") == before
    assert export(str(copy), spec_of("jsonl", tmp_path / "new")).rows == {"train": 7}


def test_a_plan_that_was_changed_is_not_gone_on_with(write: Write, tmp_path: Path):
    write("jsonl")
    plan = tmp_path / "export/_export/plan.json"
    plan.write_text(plan.read_text().replace('"rows":8', '"rows":9'))
    with pytest.raises(JobError, match="it was changed after it was written; use another --out"):
        write("jsonl")


def test_an_export_never_lies_inside_its_dataset(published: Path, copy: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(copy)
    for place in (copy, copy / "export", tmp_path / "link/deep/export"):
        with pytest.raises(UsageError, match="lies inside the dataset"):
            export(str(copy), spec_of("jsonl", place))
    assert not (copy / "export").exists()
    export(str(copy), spec_of("jsonl", tmp_path / "copy-export"))  # beside it, with a name that begins alike


def test_only_a_published_dataset_is_exported(copy: Path, tmp_path: Path):
    (copy / "_job/dataset.json").unlink()
    with pytest.raises(JobError, match="has no published dataset, and only such are exported; `latentmill status"):
        export(str(copy), spec_of("jsonl", tmp_path / "export"))
    with pytest.raises(UsageError):
        export(str(tmp_path / "nothing"), spec_of("jsonl", tmp_path / "export"))
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("damage", "words"), [("altered", "it has not the sha256 of its row"), ("missing", "it is missing")]
)
def test_a_picture_that_is_not_as_its_row_says_ends_the_export_by_name(
    damage: str, words: str, copy: Path, ok: list[dict[str, Any]], tmp_path: Path
):
    image = copy / ok[3]["image"]
    data = image.read_bytes()
    image.write_bytes(data[:-1] + b"?") if damage == "altered" else image.unlink()
    spec = spec_of("webdataset", tmp_path / "export", shard_size="2", workers=1)
    with pytest.raises(JobError, match=rf"{ok[3]['image']} .*{words}.*latentmill repair {copy}"):
        export(str(copy), spec)
    assert (tmp_path / "export/000000.tar").exists()
    assert not (tmp_path / "export/000001.tar").exists()
    assert not (tmp_path / "export/_export/export.json").exists()
    image.write_bytes(data)
    assert export(str(copy), spec).written >= 1
    assert (tmp_path / "export/000001.tar").exists()


def test_a_part_that_is_not_as_it_was_published_ends_the_export_by_name(copy: Path, tmp_path: Path):
    (part,) = (copy / "dataset").iterdir()
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(JobError, match=r"dataset/part-00000-.* is damaged: it has not the sha256"):
        export(str(copy), spec_of("jsonl", tmp_path / "export"))


@every_format
def test_no_name_of_a_forged_row_leads_out_of_an_export(to: str, copy: Path, tmp_path: Path):
    (part,) = (copy / "dataset").iterdir()
    table = pq.read_table(part)
    forged = pa.array(["../../escaped", *table.column("sample_id").to_pylist()[1:]])
    data = encode_part(table.set_column(table.schema.get_field_index("sample_id"), "sample_id", forged), {})
    digest = hashlib.sha256(data).hexdigest()
    part.unlink()
    (copy / f"dataset/part-00000-{digest[:16]}.parquet").write_bytes(data)
    manifest = json.loads((copy / "_job/dataset.json").read_text())
    path = f"dataset/part-00000-{digest[:16]}.parquet"
    manifest["parts"] = [{"path": path, "rows": 8, "bytes": len(data), "sha256": digest}]
    (copy / "_job/dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(JobError, match=r"has a row that no job writes \(sample_id '../../escaped'\)"):
        export(str(copy), spec_of(to, tmp_path / "export"))
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.rglob("escaped*"))


def test_an_output_of_an_older_format_is_exported(tmp_path: Path):
    with zipfile.ZipFile(Path(__file__).parents[1] / "outputs/data/format2.zip") as packed:
        packed.extractall(tmp_path / "old")
    (plan,) = tmp_path.glob("**/_job/plan.json")
    summary = export(str(plan.parents[1]), spec_of("hf", tmp_path / "export"))
    assert summary.rows["train"] == pq.read_table(tmp_path / "export/data").num_rows


@pytest.mark.parametrize(("size", "rows"), [("4", [4, 2]), ("12kB", [2, 2, 2]), ("1kB", [1] * 6), ("50000", [6])])
def test_shards_are_cut_by_rows_or_by_bytes(size: str, rows: list[int], write: Write, tmp_path: Path):
    write("parquet", shard_size=size)
    plan = json.loads((tmp_path / "export/_export/plan.json").read_text())
    assert [shard[3] for shard in plan["shards"]] == rows


def test_a_split_follows_from_the_row_id_alone(write: Write, tmp_path: Path):
    write("jsonl", tmp_path / "two", split="train=0.5,test=0.5")
    write("jsonl", tmp_path / "filtered", split="train=0.5,test=0.5", filter="seed >= 44")
    split_of: dict[str, dict[str, str]] = {}
    for folder in ("two", "filtered"):
        for path in sorted((tmp_path / folder).glob("*.jsonl")):
            for line in path.read_text().splitlines():
                split_of.setdefault(json.loads(line)["row_id"], {}).setdefault(path.name.split("-")[0], "")
    assert set(split_of) == {"a", "b", "e", "f"}
    assert all(len(splits) == 1 for splits in split_of.values())
    assert len({split for splits in split_of.values() for split in splits}) == 2


def test_shares_come_out_and_stay_what_they_were():
    """The same names with the same shares always give the same split: a model trained on one must not see the other."""
    spec = spec_of("jsonl", "unused", split="train=0.9,test=0.1")
    table = pa.table({"row_id": [str(number) for number in range(20_000)]})
    splits = Selection(spec, table.schema).splits(table).tolist()
    assert 1_900 < splits.count("test") < 2_100
    assert [number for number, split in enumerate(splits) if split == "test"][:5] == [5, 6, 20, 31, 70]


def test_a_shard_may_run_over_several_parts(copy: Path, write: Write, tmp_path: Path):
    (copy / "_job/dataset.json").unlink()
    publish(open_job(str(copy)), rows_per_part=3)
    assert len(load_publication(open_job(str(copy))).parts) == 3
    export(str(copy), spec_of("jsonl", tmp_path / "parts", shard_size="4", split="train=0.5,test=0.5"))
    write("jsonl", tmp_path / "whole", shard_size="4", split="train=0.5,test=0.5")
    whole, parts = digests(tmp_path / "whole"), digests(tmp_path / "parts")
    assert {path for path in whole if whole[path] != parts[path]} == {
        path for path in whole if path.startswith("_export/")
    }


def test_flagged_pictures_are_exported_only_where_asked_for(write: Write, tmp_path: Path):
    def statuses(name: str, **settings: Any) -> list[str]:
        write("jsonl", tmp_path / name, **settings)
        lines = (tmp_path / name / "train-00000-of-00001.jsonl").read_text().splitlines()
        return [json.loads(line)["status"] for line in lines]

    assert statuses("usual") == ["ok"] * 6
    assert statuses("flagged", status="flagged") == ["flagged"]
    assert sorted(statuses("both", status="flagged,ok")) == ["flagged", *["ok"] * 6]
    with pytest.raises(JobError, match=r"no row of .* is chosen: of 8 rows, none has .* status ok and status == 'fail"):
        write("jsonl", filter="status == 'failed'")


def test_a_column_of_the_manifest_makes_room_for_one_of_the_export(
    write: Write, ok: list[dict[str, Any]], tmp_path: Path
):
    write("jsonl")
    lines = (tmp_path / "export/train-00000-of-00001.jsonl").read_text().splitlines()
    for row, told in zip(ok, map(json.loads, lines), strict=True):
        assert told["manifest_file_name"] == row["file_name"]
        assert (tmp_path / "export" / told["file_name"]).is_file()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"to": "zip"}, "to 'zip' does not exist; there is webdataset, hf"),
        ({"to": None}, "--to is not given; give one of webdataset"),
        ({"out": None}, "--out is not given"),
        ({"image_format": "gif"}, "image_format 'gif' does not exist; there is png, webp, jpeg"),
        ({"image_quality": 90}, "image_quality 90 has no meaning for png; leave it out, or choose webp or jpeg"),
        ({"image_format": "jpeg", "image_quality": 101}, "image_quality 101 is outside 1..100"),
        ({"status": "failed"}, "status 'failed' cannot be exported; give ok or flagged"),
        ({"split": "train=0.9,test=0.2"}, "adds up to 1.1; it must be 1"),
        ({"split": "train=0.5,train=0.5"}, "expected names with their shares: train=0.9,test=0.1"),
        ({"split": "../x=1"}, "expected names with their shares"),
        ({"shard_size": "0"}, "expected rows or bytes: 10000, 500MB"),
        ({"shard_size": "2GB"}, "shard_size '2GB' is too large; a shard has up to 50,000 rows and 1GB"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], error: str, tmp_path: Path):
    with pytest.raises(UsageError) as refused:
        make_export_spec({"to": "hf", "out": str(tmp_path / "export"), **settings})
    assert error in str(refused.value)


@pytest.mark.s3
def test_an_export_goes_to_a_bucket_as_to_a_disk(s3: str, write: Write, tmp_path: Path):
    import s3fs

    write("webdataset", f"{s3}/export", shard_size="2")
    write("webdataset", tmp_path / "export", shard_size="2")
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    root = f"{s3.removeprefix('s3://')}/export/"
    files = {path.removeprefix(root): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(root)}
    assert files == digests(tmp_path / "export")
    fs.rm_file(f"{root}000001.tar")
    assert write("webdataset", f"{s3}/export", shard_size="2").written == 1


@pytest.mark.slow
def test_the_command_says_what_it_wrote_and_ends_with_the_code_of_its_error(published: Path, tmp_path: Path):
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "latentmill", "export", published, *arguments, "--out", tmp_path / "export"]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)

    done = call("--to", "csv", "--json", "--quiet")
    assert (done.returncode, json.loads(done.stdout)["rows"]) == (0, {"train": 6})
    told = call("--to", "csv", "--quiet")
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    refused = call("--to", "hf")
    assert refused.returncode == 3
    assert refused.stderr.splitlines()[-1].startswith("error: ")


def test_no_more_shards_are_held_in_memory_than_workers_are_asked_for(write: Write, monkeypatch: pytest.MonkeyPatch):
    lock, at_work, most = threading.Lock(), 0, 0
    real = runners.write_shard

    def watched(*arguments: Any) -> Any:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.02)
        try:
            return real(*arguments)
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(runners, "write_shard", watched)
    assert write("jsonl", shard_size="1", workers=2).shards == 6
    assert most == 2


def test_what_a_killed_export_left_under_a_temporary_name_is_read_by_nobody(write: Write, tmp_path: Path):
    write("parquet", shard_size="2")
    data = tmp_path / "export/data"
    whole = pq.read_table(data).num_rows
    (data / f".train-00000-of-00003.{'0' * 12}.tmp").write_bytes(b"half a shard")  # as the store names them
    assert pq.read_table(data).num_rows == whole == 6
    assert polars.read_parquet(data / "*.parquet").height == whole
    assert duckdb.sql(f"from '{data}/*.parquet'").shape[0] == whole
    assert write("parquet", shard_size="2", verify=True).written == 0


def test_a_card_that_was_edited_is_put_back_by_the_same_command(write: Write, tmp_path: Path):
    write("hf")
    before = digests(tmp_path / "export")
    (tmp_path / "export/README.md").write_text("mine")
    assert write("hf").written == 0
    assert digests(tmp_path / "export") == before
