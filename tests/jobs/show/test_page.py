from __future__ import annotations

import datetime
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from latentmill.jobs import xmp
from latentmill.jobs.ledger.pictures import encode_png
from latentmill.jobs.show.page import MAX_TEXT, PageFolder, encode_columns, thumbnail
from latentmill.jobs.store.storage import Storage

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\u2028\u2029\x00\x1b",
    "\ud800",
    "🐦",
]
CALL = re.compile(rb'latentmill\.receive\(("data/[\w.-]+\.js"), JSON\.parse\((".*")\)\);\n', re.ASCII)


def value_in(script: bytes):
    """What a browser would get: a JSON literal in a literal of JavaScript, which JSON's are."""
    call = CALL.fullmatch(script)
    assert call is not None
    return json.loads(json.loads(call[2]))


def data_files(storage: Storage) -> set[str]:
    return {path.removeprefix("report/data/") for path, _ in storage.list("report/data")}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "out"))


def test_no_text_leaves_its_literal(storage: Storage):
    place = PageFolder(storage, "report").add("rows", HOSTILE)
    script = storage.read(f"report/{place}")
    assert value_in(script) == HOSTILE
    assert script.isascii()
    assert b"<" not in script
    assert json.loads(CALL.fullmatch(script)[1]) == place


def test_what_has_not_changed_is_not_written_again(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    first = PageFolder(storage, "report").add("rows", [1, 2])
    written: list[str] = []
    real = Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, path, data: (written.append(path), real(self, path, data)))
    page = PageFolder(storage, "report")
    assert page.add("rows", [1, 2]) == first
    assert page.add("rows", [1, 3]) != first
    assert len(written) == 1


def test_data_stay_for_one_publication_more_because_a_page_may_be_open(storage: Storage):
    page = PageFolder(storage, "report")
    names = []
    for number in range(3):
        names.append(page.add("rows", [number]).removeprefix("data/"))
        page.publish({"rows": number})
        assert data_files(storage) == {"meta.js", *names[-2:]}
    assert value_in(storage.read("report/data/meta.js")) == {"rows": 2}
    later = PageFolder(storage, "report")
    later.publish({})
    assert data_files(storage) == {"meta.js"}


def test_columns_are_numbers_or_each_text_once():
    table = pa.table(
        {
            "seed": pa.array([1, None, 3], pa.uint32()),
            "guidance_scale": pa.array([7.3, float("nan"), None], pa.float32()),
            "id": pa.array([2**60, 1, 2], pa.int64()),
            "prompt": ["a cat", "a dog", "a cat"],
            "flag": [True, None, False],
            "when": pa.array([datetime.datetime(2026, 1, 2), None, None], pa.timestamp("ns")),
            "tags": [["a", "ü"], [], None],
            "raw": [b"\xff", None, None],
            "__proto__": ["x", "x", "x"],
        }
    )
    columns = {column["name"]: column for column in encode_columns(table)}
    assert columns["seed"] == {"name": "seed", "kind": "number", "numbers": [1, None, 3]}
    assert columns["guidance_scale"]["numbers"] == [7.3, None, None]
    assert (columns["id"]["kind"], columns["id"]["texts"][0]) == ("text", str(2**60))
    assert columns["prompt"] == {"name": "prompt", "kind": "text", "texts": ["a cat", "a dog"], "codes": [0, 1, 0]}
    assert (columns["flag"]["texts"], columns["flag"]["codes"]) == (["true", "false"], [0, -1, 1])
    assert columns["when"]["texts"] == ["2026-01-02 00:00:00.000000000"]
    assert columns["tags"]["texts"] == ['["a", "ü"]', "[]"]
    assert columns["raw"]["texts"] == ["ff"]
    assert columns["__proto__"]["texts"] == ["x"]


def test_long_texts_are_cut_unless_all_of_them_is_asked_for():
    table = pa.table({"prompt": ["x" * 10_000]})
    assert encode_columns(table)[0]["texts"] == ["x" * MAX_TEXT + "…"]
    assert encode_columns(table, whole=True)[0]["texts"] == ["x" * 10_000]


def test_a_thumbnail_is_small_never_enlarged_and_marked():
    wide = encode_png(np.full((64, 512, 3), (200, 30, 30), np.uint8))
    small = Image.open(io.BytesIO(thumbnail(wide, 128, (512, 64))))
    assert (small.format, small.size) == ("WEBP", (128, 16))
    assert xmp.source_type(small.info["xmp"]) == xmp.DIGITAL_SOURCE_TYPE
    assert Image.open(io.BytesIO(thumbnail(wide, 1024))).size == (512, 64)
    with pytest.raises(ValueError, match="512x64"):
        thumbnail(wide, 128, (64, 64))


def test_a_page_brings_the_files_that_all_pages_share(storage: Storage):
    assert PageFolder(storage, "report").write_page("icon.svg", []) == "report/icon.svg"
    assert {path for path, _ in storage.list("report")} == {
        f"report/{n}" for n in ("common.css", "common.js", "icon.svg")
    }
