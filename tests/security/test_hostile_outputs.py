"""An output that somebody has tampered with: no verb leaves it, hangs on it, or fills the memory with it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger import records
from latentmill.jobs.ledger.ledger import record_path
from latentmill.jobs.outputs.clean import clean
from latentmill.jobs.outputs.publish import MANIFEST_PATH, encode_part, load_publication
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.planned import PLAN_PATH, fingerprint
from latentmill.jobs.show.report import report
from latentmill.jobs.store.parquet import read_parquet
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.outputs.repairs import repair

pytestmark = pytest.mark.slow

Manifest = Callable[..., Path]
Change = Callable[[dict[str, Any]], Mapping[str, Any]]
ROOT = Path(__file__).parents[2]
PROMPTS = ["one", "two", "three", "some poison", "five", "six"]
MEMORY = 6 << 30
"""Address space of a verb: enough for the libraries, and an end to what would fill this machine."""


@pytest.fixture
def out(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> Path:
    """A finished job of three chunks."""
    out = tmp_path / "out"
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


@pytest.fixture
def twin(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> Path:
    """Another output of the same plan: what it holds looks to the first like attempts that lost."""
    out = tmp_path / "twin"
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def link_to(target: Path, place: Path) -> None:
    """A symbolic link in the place of a folder or a file."""
    if place.exists():
        place.rename(place.with_name(f"{place.name}.moved"))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def call(*arguments: object) -> tuple[int, str, str, int]:
    """A verb in a process of its own, with little memory and no hour to spare; its answers, and its peak in MiB."""
    program = f"""
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
from latentmill import cli
try:
    cli.main()
finally:
    status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would begin with the peak of who started it
    print("peak", int(status.partition("VmHWM:")[2].split()[0]) // 1024, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    words, _, peak = done.stderr.rpartition("peak ")
    assert "Traceback" not in words, words[-2000:]
    return done.returncode, done.stdout, words, int(peak)


@pytest.fixture(scope="module")
def usual_peak(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a verb takes on an honest output, in MiB."""
    folder = tmp_path_factory.mktemp("honest")
    prompts = folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    run(job_spec(tiny_model, prompts, folder / "out"))
    return max(call(verb, folder / "out")[3] for verb in ("verify", "report"))


def forge_record(out: Path, chunk: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """A sealed, well-formed record in the place of a chunk's own."""
    job = open_job(str(out))
    record = job.ledger.read(chunk)
    assert record is not None
    metadata = {"plan_hash": record.plan_hash, "attempt": record.attempt, "chunk": str(chunk), "execution_class": "x"}
    buffer = io.BytesIO()
    table = change(record.table)
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({f"latentmill.{key}": value for key, value in metadata.items()})
        writer.add_key_value_metadata({"latentmill.seal": (records._SEAL_PREFIX + records._BLANK).decode()})
    (out / record_path(chunk)).write_bytes(records._seal(buffer.getvalue()))


def forge_rows(out: Path, change: Change) -> None:
    """The same change in every row that has a picture, in records and published parts alike, digests and all."""

    def changed(table: pa.Table) -> pa.Table:
        rows = [dict(row) | (change(row) if row["image"] else {}) for row in table.to_pylist()]
        return pa.Table.from_pylist(rows, schema=table.schema)

    for chunk in range(open_job(str(out)).plan.n_chunks):
        forge_record(out, chunk, changed)
    document = json.loads((out / MANIFEST_PATH).read_text())
    (part,) = document["parts"]
    data = encode_part(changed(read_parquet((out / part["path"]).read_bytes())), {})
    digest = hashlib.sha256(data).hexdigest()
    part |= {"path": f"dataset/part-00000-{digest[:16]}.parquet", "bytes": len(data), "sha256": digest}
    (out / part["path"]).write_bytes(data)
    (out / MANIFEST_PATH).write_text(json.dumps(document))


def forge_plan(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A plan.json that says something else, checksums and all."""
    document = json.loads((out / PLAN_PATH).read_text())
    del document["checksum"]
    change(document)
    document["plan_hash"] = fingerprint(document["identity"])
    (out / PLAN_PATH).write_text(json.dumps({**document, "checksum": fingerprint(document)}))


# Files outside an output


@pytest.mark.parametrize("name", ["../victim.txt", "{folder}/victim.txt", "dataset/../../victim.txt", "images/x"])
def test_run_deletes_nothing_that_a_forged_dataset_manifest_names(
    name: str, out: Path, tmp_path: Path, tiny_model: Path
) -> None:
    victims = [tmp_path / "victim.txt", out / "images/x"]
    for victim in victims:
        victim.write_text("precious")
    assert repair(str(out), 1).outcome == "committed"
    document = json.loads((out / MANIFEST_PATH).read_text())
    document["parts"][0]["path"] = name.format(folder=tmp_path)
    (out / MANIFEST_PATH).write_text(json.dumps(document))
    assert load_publication(open_job(str(out))) is None
    assert {defect.kind for defect in verify(str(out)).defects} == {"not-published"}
    assert run(job_spec(tiny_model, tmp_path / "prompts.txt", out)).exit_code == 0
    assert [victim.read_text() for victim in victims] == ["precious"] * 2
    assert verify(str(out)).defects == ()


@pytest.mark.parametrize("place", ["images", "images/00000", "ledger", "ledger/00000", "dataset", "_job"])
def test_clean_follows_no_symbolic_link(place: str, out: Path, twin: Path) -> None:
    before = everything(twin)
    link_to(twin / place, out / place)
    with pytest.raises(JobError, match=rf"{place}.* is a symbolic link") as caught:
        clean(str(out), grace_seconds=-10)
    assert "\n" not in str(caught.value)
    assert everything(twin) == before


def test_clean_removes_a_link_and_not_what_it_points_to(out: Path, twin: Path) -> None:
    before = everything(twin)
    loser = out / "images/00000/00000000-0123456789abcdef"
    loser.mkdir()
    (loser / "00000000.png").symlink_to(next((twin / "images").rglob("*.png")))
    (loser / "deeper").symlink_to(twin / "images")
    (out / "images/00000/.x.0123456789ab.tmp").symlink_to(twin / "dataset")
    clean(str(out), grace_seconds=-10)
    assert everything(twin) == before
    assert list(loser.iterdir()) == []


@pytest.mark.parametrize("verb", [verify, report, status])
@pytest.mark.parametrize("place", ["ledger", "dataset"])
def test_readers_follow_no_symbolic_link(verb: Callable[[str], object], place: str, out: Path, twin: Path) -> None:
    link_to(twin / place, out / place)
    if (verb, place) == (report, "ledger"):
        return  # it reads the published dataset alone
    with pytest.raises(JobError, match=rf"{place}.* is a symbolic link"):
        verb(str(out))


def test_report_writes_and_deletes_nothing_through_a_symbolic_link(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name in ("sheet-0001.png", "sheet-0009.png"):
        (target / name).write_text("precious")
    before = everything(target)
    link_to(target, out / "report")
    with pytest.raises(JobError, match="report is a symbolic link"):
        report(str(out))
    assert everything(target) == before


def test_report_replaces_a_link_at_a_sheets_name_and_not_its_target(out: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (out / "report").mkdir()
    for name in ("sheet-0001.png", "sheet-0009.png", "index.html"):
        (out / "report" / name).symlink_to(tmp_path / "target")
    report(str(out))
    assert (tmp_path / "target").read_text() == "precious"
    assert not [path for path in (out / "report").rglob("*") if path.is_symlink()]
    assert [path.name for path in (out / "report").glob("sheet-*")] == ["sheet-0001.png"]


def test_report_removes_only_what_a_report_wrote(out: Path) -> None:
    names = ["sheet-notes.txt", "sheet-0009.png.bak", "sheet-1.png", "sheet-0009.png", "more/sheet-0009.png"]
    (out / "report/more").mkdir(parents=True)
    for name in names:
        (out / "report" / name).write_text("mine")
    report(str(out))
    sheets = {name for name in everything(out / "report") if "sheet" in name}
    assert sheets == {*names, "sheet-0001.png"} - {"sheet-0009.png"}


def test_an_output_may_itself_be_a_symbolic_link(out: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(out)
    assert verify(str(link)).exit_code == 0
    assert report(str(link)).sheets
    assert clean(str(link)).exit_code == 0


# Names of pictures


@pytest.mark.slow
def test_forged_names_of_pictures_open_nothing(out: Path, tmp_path: Path, usual_peak: int) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(secret)
    os.mkfifo(out / "images/fifo")
    fifo = next((out / "images").rglob("00000005.png"))
    fifo.unlink()
    os.mkfifo(fifo)
    forged = {"00000000": "/dev/zero", "00000001": "/etc/hostname", "00000002": "../secret.png"}
    forged |= {"00000004": "images/fifo"}
    forge_rows(out, lambda row: {"image": forged.get(row["sample_id"], row["image"])})
    code, said, _, peak = call("verify", out, "--json")
    defects = json.loads(said)["defects"]
    assert code == 1
    assert peak < usual_peak + 100
    wrong = [
        defect["detail"] for defect in defects if defect["kind"] == "row-wrong" and "its image" in defect["detail"]
    ]
    assert [sample for sample in forged if any(sample in detail for detail in wrong)] == list(forged)
    assert [defect["kind"] for defect in defects if defect["path"].endswith("00000005.png")] == ["image-damaged"]
    code, said, _, peak = call("report", out, "--json")
    assert code == 0
    assert peak < usual_peak + 100
    with Image.open(out / json.loads(said)["sheets"][0]) as sheet:
        assert (255, 0, 0) not in {colour for _, colour in sheet.getcolors(1 << 24)}


@pytest.mark.parametrize(
    "name", ["_job/plan.json", "images/00000/../00000/x.png", "images/00001/{attempt}/{sample}.png"]
)
def test_a_picture_has_its_own_name_or_is_a_defect(name: str, out: Path) -> None:
    attempt = next((out / "images/00000").iterdir()).name
    forge_rows(out, lambda row: {"image": name.format(attempt=attempt, sample=row["sample_id"])})
    details = [defect.detail for defect in verify(str(out)).defects if defect.kind == "row-wrong"]
    assert len(details) == 5
    assert all("its image" in detail for detail in details)


def test_another_samples_picture_is_a_defect(out: Path) -> None:
    other = next((out / "images").rglob("00000004.png")).relative_to(out).as_posix()
    forge_rows(out, lambda row: {"image": other} if row["sample_id"] == "00000005" else {})
    (defect,) = (defect for defect in verify(str(out)).defects if defect.kind == "row-wrong")
    assert "sample 00000005: its image" in defect.detail


# Memory


@pytest.mark.slow
def test_a_picture_that_has_grown_is_not_read(out: Path, usual_peak: int) -> None:
    picture = next((out / "images").rglob("*.png"))
    with picture.open("r+b") as file:
        file.truncate(40 << 30)  # sparse
    code, said, _, peak = call("verify", out, "--json")
    assert [defect["kind"] for defect in json.loads(said)["defects"]] == ["image-damaged"]
    assert (code, peak < usual_peak + 100) == (1, True)
    forge_rows(out, lambda _: {"bytes": 2**32 - 1})
    code, said, _, peak = call("verify", out, "--json")
    assert (code, peak < usual_peak + 200) == (1, True)


@pytest.mark.parametrize("name", [PLAN_PATH, MANIFEST_PATH, record_path(0)])
def test_a_file_that_has_grown_is_not_read(name: str, out: Path, usual_peak: int) -> None:
    with (out / name).open("r+b") as file:
        file.truncate(40 << 30)
    code, _, err, peak = call("verify", out, "--json")
    assert (code, peak < usual_peak + 300) == (2 if name == PLAN_PATH else 1, True), err


def png_bomb(side: int) -> bytes:
    """A black PNG of side x side pixels, in a hundredth of its size."""
    squeeze = zlib.compressobj(1)
    rows = b"".join(squeeze.compress(bytes(1 + 3 * side)) for _ in range(side)) + squeeze.flush()
    header = side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    parts = [len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4) for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("claimed", [64, 8_000])
@pytest.mark.slow
def test_a_picture_that_unfolds_to_gigabytes_is_told_by_its_header(claimed: int, out: Path, usual_peak: int) -> None:
    bomb = png_bomb(8_000)
    for picture in (out / "images").rglob("*.png"):
        picture.write_bytes(bomb)
    digest = hashlib.sha256(bomb).hexdigest()
    forge_rows(out, lambda _: {"bytes": len(bomb), "sha256": digest, "width": claimed, "height": claimed})
    code, said, _, peak = call("verify", out, "--json")
    assert [defect["kind"] for defect in json.loads(said)["defects"]].count("pixels-changed") == 5
    assert (code, peak < usual_peak + 100) == (1, True), peak
    code, _, _, peak = call("report", out, "--json")
    assert (code, peak < usual_peak + 100) == (0, True), peak


def test_the_mark_of_a_picture_that_unfolds_to_gigabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_bomb(8_000))
    code, _, err, peak = call("inspect", tmp_path / "bomb.png")
    assert (code, peak < 1000) == (2, True), peak
    assert re.search(r"bomb.png has 8000x8000 pixels.*the limit is", err)


def many_rows(table: pa.Table) -> pa.Table:
    """7,000 rows with a prompt of 1 MiB each, which the file holds once."""
    rows = table.slice(0, 1).take(pa.array([0] * 7000))
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * 7000, pa.int32()), pa.array(["x" * (1 << 20)]))
    return rows.set_column(rows.schema.get_field_index("prompt"), "prompt", prompts)


def huge_row(table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    rows[0]["prompt"] = "x" * (1 << 28)
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.mark.parametrize("bomb", [many_rows, huge_row])
@pytest.mark.slow
def test_a_record_that_unfolds_to_gigabytes_is_damaged(
    bomb: Callable[[pa.Table], pa.Table], out: Path, usual_peak: int
) -> None:
    forge_record(out, 0, bomb)
    assert (out / record_path(0)).stat().st_size < 600_000
    code, said, _, peak = call("verify", out, "--json")
    (defect,) = json.loads(said)["defects"]
    assert (code, defect["kind"], defect["path"]) == (1, "record-damaged", record_path(0))
    assert peak < usual_peak + 100, peak


@pytest.mark.slow
def test_a_part_that_unfolds_to_gigabytes_is_damaged(out: Path, usual_peak: int) -> None:
    document = json.loads((out / MANIFEST_PATH).read_text())
    (part,) = document["parts"]
    buffer = io.BytesIO()
    table = many_rows(read_parquet((out / part["path"]).read_bytes()))
    pq.write_table(table, buffer, compression="zstd", store_schema=False)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    part |= {"path": f"dataset/part-00000-{digest[:16]}.parquet", "bytes": len(data), "sha256": digest}
    document["counts"]["failed"] = 20
    (out / part["path"]).write_bytes(data)
    (out / MANIFEST_PATH).write_text(json.dumps(document))
    code, said, _, peak = call("verify", out, "--json")
    assert (code, peak < usual_peak + 100) == (1, True), peak
    assert (part["path"], "dataset-wrong") in {
        (defect["path"], defect["kind"]) for defect in json.loads(said)["defects"]
    }
    code, _, err, peak = call("report", out)
    assert (code, peak < usual_peak + 300) == (1, True), peak
    assert "part-00000" in err


DEEP = b"[" * 200_000
MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows that nobody has": lambda document: document["parts"][0].update(rows=10**15),
    "no rows": lambda document: document["parts"][0].update(rows=0),
    "a text for a number": lambda document: document["parts"][0].update(rows="many"),
    "no digest": lambda document: document["parts"][0].update(sha256=None),
    "counts of nothing": lambda document: document.update(counts={}),
    "counts in words": lambda document: document.update(counts={"ok": "all", "flagged": 0, "failed": 0}),
    "a number for a list": lambda document: document.update(execution_classes=7),
    "infinity": lambda document: document.update(image_bytes=float("inf")),
}


@pytest.mark.parametrize("forgery", [*MANIFESTS, "deep", "long"])
def test_a_forged_dataset_manifest_is_none(forgery: str, out: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = out / MANIFEST_PATH
    honest = path.read_bytes()
    if forgery in MANIFESTS:
        document = json.loads(honest)
        MANIFESTS[forgery](document)
        path.write_text(json.dumps(document))
    else:
        path.write_bytes(DEEP if forgery == "deep" else b"9" * 10_000)
    assert "not-published" in {defect.kind for defect in verify(str(out)).defects}
    assert status(str(out)).state == "complete"
    assert report(str(out)).sheets == (), "there is no dataset to draw sheets of"
    run(job_spec(tiny_model, tmp_path / "prompts.txt", out))
    assert path.read_bytes() == honest


def endless_axes(plan: dict[str, Any]) -> None:
    """4,000 times 4,000 sizes: more groups than anybody can wait for."""
    plan["identity"]["axes"] = [[name, list(range(1, 4000))] for name in ("width", "height")]
    plan["manifest"]["classes"] = [values[2:] for values in plan["manifest"]["classes"]]


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "10^15 samples": lambda plan: plan["manifest"].update(images=[[10**15]]),
    "more than a whole number holds": lambda plan: plan["manifest"].update(images=[[10**30]]),
    "fewer than none": lambda plan: plan["manifest"].update(images=[[-6]]),
    "chunks of nothing": lambda plan: plan["identity"].update(chunk_size=0),
    "chunks of everything": lambda plan: plan["identity"].update(chunk_size=10**9),
    "axes without end": endless_axes,
    "no manifest": lambda plan: plan.pop("manifest"),
    "no identity of its model": lambda plan: plan.update(model={}),
    "columns that are none": lambda plan: plan["manifest"].update(carried="00"),
    "words for numbers": lambda plan: plan["manifest"].update(images="many"),
}


@pytest.mark.parametrize("forgery", [*PLANS, "deep"])
def test_a_forged_plan_is_one_line(forgery: str, out: Path) -> None:
    if forgery == "deep":
        (out / PLAN_PATH).write_bytes(b'{"identity": ' + DEEP)
    else:
        forge_plan(out, PLANS[forgery])
    for verb in (status, verify, clean, report):
        with pytest.raises(JobError, match=r"_job/plan\.json") as caught:
            verb(str(out))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


# Things that vanish


def test_a_link_to_nothing_ends_no_listing(out: Path) -> None:
    for folder in ("images/00000", "ledger/00000", "dataset", "_job"):
        (out / folder / "gone").symlink_to(out / "nowhere")
        (out / folder / ".gone").symlink_to(out / "nowhere")
    assert {defect.kind for defect in verify(str(out)).defects} == {"record-stray", "part-stray"}
    assert clean(str(out)).exit_code == 0
    assert status(str(out)).state == "published"
    assert sum(path.endswith("gone") for path, _ in Storage.open(str(out)).list("")) == 4
