from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.publish import load_publication
from latentmill.jobs.outputs.score import score
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.show.gallery import BLOCK_ROWS, CommittedRows, Gallery
from latentmill.jobs.show.report import report
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.test_reuse import forged

pytestmark = pytest.mark.slow

LITERAL = re.compile(rb'latentmill\.receive\("[^"]+", JSON\.parse\((".*")\)\);\n', re.ASCII)
HOSTILE = '</script><script>window.hit = 1</script> "><img src=x onerror="window.hit = 2"> \u202eabc'


def read_data(storage: Storage, place: str) -> Any:
    return json.loads(json.loads(LITERAL.fullmatch(storage.read(f"report/{place}"))[1]))


def meta_of(out: str) -> dict[str, Any]:
    return read_data(Storage.open(out), "data/meta.js")


def rows_of(out: str) -> Iterator[dict[str, Any]]:
    """What the page would show, row by row."""
    storage, meta = Storage.open(out), meta_of(out)
    for block in meta["blocks"]:
        rows = read_data(storage, block["rows"])
        details = [read_data(storage, place) for place in block["details"]]
        for place, number in enumerate(rows["numbers"]):
            part, within = divmod(place, meta["detailRows"])
            yield {
                "sample": number,
                "picture": rows["pictures"][place],
                **{column["name"]: value_of(column, place) for column in rows["columns"]},
                **{column["name"]: value_of(column, within) for column in details[part]["columns"]},
            }


def value_of(column: dict[str, Any], row: int) -> Any:
    values = column["numbers"] if column["kind"] == "number" else column["codes"]
    value = values[row] if isinstance(values, list) else values
    return value if column["kind"] == "number" else None if value < 0 else column["texts"][value]


def thumbnails(out: str) -> list[str]:
    return sorted(path for path, _ in Storage.open(out).list("report/thumbs"))


@pytest.fixture
def make(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    def make(prompts: list[str], **settings: Any) -> str:
        out = str(tmp_path / "out")
        run(job_spec(tiny_model, manifest(prompts), out, **settings))
        return out

    return make


def test_the_page_has_every_row_with_what_it_takes_to_look_at_it(make: Callable[..., str]):
    out = make([HOSTILE, "x" * 2000, "poison", "nsfw"], sweep={"guidance_scale": [3, 5.1]})
    summary = report(out)
    assert (summary.gallery.page, summary.gallery.state) == ("report/index.html", "published")
    assert (summary.gallery.rows, summary.gallery.thumbnails) == (8, 4)
    rows = list(rows_of(out))
    assert [row["sample"] for row in rows] == list(range(8))
    assert [row["prompt"] for row in rows[:4]] == [HOSTILE, HOSTILE, "x" * 2000, "x" * 2000]
    assert [row["guidance_scale"] for row in rows[:2]] == [3, 5.1]
    assert [row["picture"] for row in rows] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [row["status"] for row in rows[4:]] == ["failed", "failed", "flagged", "flagged"]
    meta = meta_of(out)
    assert meta["counts"] == {"ok": 4, "flagged": 2, "failed": 2}
    assert meta["axes"] == [{"name": "guidance_scale", "values": [3, 5.1]}]
    storage = Storage.open(out)
    for row, path in zip(rows[:4], thumbnails(out), strict=True):
        assert path == f"report/{meta['thumbs']}/00000/{row['sample']:0{meta['digits']}d}.webp"
        assert Image.open(io.BytesIO(storage.read(path))).size == (64, 64)
        assert storage.exists(row["image"])


def test_the_page_itself_holds_nothing_of_the_job(make: Callable[..., str]):
    out = Path(make([HOSTILE]))
    report(str(out))
    page = (out / "report/index.html").read_text(encoding="utf-8")
    assert "hit" not in page
    assert all((out / "report" / source).is_file() for source in re.findall(r'(?:src|href)="([^"]+)"', page))


def test_writing_it_again_costs_only_what_is_new(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    out = make(["a", "b", "c"])
    report(out)
    written: list[str] = []
    real = Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, path, data: (written.append(path), real(self, path, data)))
    assert report(out, max_sheets=0).gallery.thumbnails == 0
    assert [path for path in written if "/thumbs/" in path or "/data/" in path] == ["report/data/meta.js"]
    lost = thumbnails(out)[1]
    Storage.open(out).delete(lost)
    assert report(out).gallery.thumbnails == 1
    assert lost in thumbnails(out)


def test_pictures_that_are_not_as_they_were_written_are_shown_as_such(make: Callable[..., str]):
    out = make(["a", "b", "c"])
    first, second, _ = sorted(Path(out).glob("images/*/*/*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    assert report(out).gallery.unreadable == 2
    assert [row["picture"] for row in rows_of(out)] == [3, 3, 1]
    assert [row["status"] for row in rows_of(out)] == ["ok", "ok", "ok"]


@pytest.mark.parametrize(("policy", "known"), [("keep", 2), ("blank", 0), ("drop", 0)])
def test_a_flagged_picture_is_not_shown_unasked(make: Callable[..., str], policy: str, known: int):
    out = make(["nsfw"], on_flagged=policy)
    report(out)
    assert [row["picture"] for row in rows_of(out)] == [known]
    assert thumbnails(out) == []


def test_a_stranger_s_row_of_a_model_that_is_none_is_shown_as_it_is(make: Callable[..., str], tiny_model: Path):
    """Rows are believed no further than they are shown."""
    out = make(["a"], sweep={"model": ["embedded", str(tiny_model)]})
    for chunk in range(2):
        forged(out, chunk, lambda _: {"model": HOSTILE, "model_sha256": HOSTILE})
    Path(out, "_job/dataset.json").unlink()
    assert report(out).gallery.rows == 2
    assert [row["model"] for row in rows_of(out)] == [HOSTILE] * 2


def test_scores_are_columns_of_the_page(make: Callable[..., str]):
    out = make(["a", "b"])
    score(out, ["sharpness"], ScoreSpec())
    report(out)
    assert "sharpness" in {column["name"] for column in meta_of(out)["columns"]}
    assert all(row["sharpness"] > 0 for row in rows_of(out))


def test_axes_are_columns_whatever_kind_of_axis_it_is(make: Callable[..., str]):
    sweep = {"width": [64, 128], "height": [128, 64], "prompt.s/cat/": ["dog", "bird"], "seed": [7]}
    out = make(["a cat"], sweep=sweep, zip=[["width", "height"]])
    report(out)
    assert meta_of(out)["axes"] == [{"name": "width", "values": [64, 128]}, {"name": "prompt", "values": []}]
    assert [(row["width"], row["height"]) for row in rows_of(out)] == [(64, 128), (64, 128), (128, 64), (128, 64)]
    assert [row["prompt"] for row in rows_of(out)] == ["a dog", "a bird"] * 2


def test_the_limit_is_told(make: Callable[..., str]):
    out = make(["a", "b", "c"])
    summary = report(out, max_pictures=2)
    assert (summary.gallery.rows, summary.gallery.samples) == (2, 3)
    assert (meta_of(out)["limit"], meta_of(out)["samples"]) == (2, 3)
    assert len(thumbnails(out)) == 2


def test_a_running_job_is_followed_until_it_is_published(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    """Here the ledger fills up between two looks, in the order of execution, which is not that of samples."""
    out = Path(make([f"p{number}" for number in range(6)]))
    records = sorted((out / "ledger").rglob("*.parquet"))
    away = {record: record.read_bytes() for record in records}
    manifest = out / "_job/dataset.json"
    published = manifest.read_bytes()
    manifest.unlink()
    for record in records:
        record.unlink()
    seen: list[tuple[int, bool]] = []

    def meanwhile(seconds: float) -> None:
        assert seconds == 10
        meta = meta_of(str(out))
        seen.append((sum(block["n"] for block in meta["blocks"]), meta["live"]))
        if away:
            record, data = away.popitem()
            record.write_bytes(data)
        else:
            manifest.write_bytes(published)

    summary = report(str(out), live=True, sleep=meanwhile)
    assert seen == [(0, True), (2, True), (4, True), (6, True)]
    assert (summary.gallery.state, meta_of(str(out))["live"]) == ("published", False)
    assert [row["sample"] for row in rows_of(str(out))] == list(range(6))
    assert len(summary.sheets) == 1


def test_a_page_that_nobody_writes_any_more_stops_to_look(make: Callable[..., str]):
    out = Path(make(["a"]))
    (out / "_job/dataset.json").unlink()

    def interrupt(_: float) -> None:
        assert meta_of(str(out))["live"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(str(out), live=True, sleep=interrupt)
    meta = meta_of(str(out))
    assert (meta["live"], meta["state"], len(list(rows_of(str(out))))) == (False, "running", 1)


def test_a_record_is_read_once_and_again_when_it_is_repaired(make: Callable[..., str]):
    out = make(["a", "b", "poison"])
    job = open_job(out)
    rows = CommittedRows(job, 100)
    assert list(rows.refresh()) == [0]
    assert list(rows.refresh()) == []
    numbers, table = rows.block(0)
    assert (numbers, table.column("status").to_pylist()) == ([0, 1, 2], ["ok", "ok", "failed"])
    gallery = Gallery(job=job, side=64, limit=100)
    gallery.write(CommittedRows(job, 2), live=False)
    assert [row["sample"] for row in rows_of(out)] == [0, 1]


def test_blocks_divide_the_rows_without_a_rest(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    out = make([f"p{number}" for number in range(7)])
    monkeypatch.setattr("latentmill.jobs.show.gallery.BLOCK_ROWS", 3)
    monkeypatch.setattr("latentmill.jobs.show.gallery.DETAIL_ROWS", 2)
    report(out)
    assert [(block["n"], len(block["details"])) for block in meta_of(out)["blocks"]] == [(3, 2), (3, 2), (1, 1)]
    assert [row["prompt"] for row in rows_of(out)] == [f"p{number}" for number in range(7)]
    assert load_publication(open_job(out)).rows < BLOCK_ROWS
