"""A stranger's rows, sealed and published as a job would: every verb answers, or refuses them in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.compare.compare import compare
from latentmill.jobs.errors import JobError
from latentmill.jobs.exports.export import export
from latentmill.jobs.exports.spec import make_export_spec
from latentmill.jobs.exports.table import EXPORTS
from latentmill.jobs.inspection import inspect_files
from latentmill.jobs.outputs.publish import encode_part
from latentmill.jobs.outputs.regenerate import Drawing, regenerate
from latentmill.jobs.outputs.score import score
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.recipe import Recipe
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.show.comparison import compare_outputs
from latentmill.jobs.show.report import report
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import FakeEngine
from tests.jobs.test_reuse import forged

pytestmark = pytest.mark.long

STRANGE: list[dict[str, Any]] = [
    {"sample_id": "x"},
    {"sample_id": None},
    {"sample_id": "9" * 40},
    {"sample_id": "00000001"},
    {"row_id": None},
    {"prompt": None},
    {"negative_prompt": None},
    {"status": None},
    {"status": "weird"},
    {"seed": None},
    {"width": None},
    {"width": 65_535, "height": 65_535},
    {"guidance_scale": None},
    {"guidance_scale": float("nan")},
    {"nsfw_score": float("nan")},
    {"image": None},
    {"image": "../../etc/passwd"},
    {"image": "_job/plan.json"},
    {"bytes": None},
    {"bytes": 4_000_000_000},
    {"sha256": None},
    {"pixel_sha256": None},
    {"model": None, "model_sha256": None},
    {"precision": "x", "batch_size": 0, "execution_class": None},
    {"error": "e" * 100_000, "status": "failed"},
    {"status": "flagged", "on_flagged": "keep"},
]
READERS = ("report", "compare", "page", "score", *EXPORTS, "regenerate", "verify", "inspect")


@pytest.fixture(scope="module")
def sound(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    (folder / "prompts.txt").write_text("one\ntwo\n")
    run(job_spec(tiny_model, folder / "prompts.txt", folder / "out", sweep={"guidance_scale": [3, 5]}))
    return folder / "out"


def published(out: Path, change: dict[str, Any]) -> None:
    """The second row of the dataset is changed, and all digests are right."""
    (part,) = (out / "dataset").iterdir()
    table = pq.read_table(part)
    rows = table.to_pylist()
    rows[1] |= change
    data = encode_part(pa.Table.from_pylist(rows, table.schema), {})
    digest = hashlib.sha256(data).hexdigest()
    part.unlink()
    path = f"dataset/part-00000-{digest[:16]}.parquet"
    (out / path).write_bytes(data)
    told = json.loads((out / "_job/dataset.json").read_text())
    told["parts"] = [{"path": path, "rows": len(rows), "bytes": len(data), "sha256": digest}]
    (out / "_job/dataset.json").write_text(json.dumps(told))


def committed(out: Path, change: dict[str, Any]) -> None:
    """The rows of a record are changed, it is sealed, and the dataset is not published."""
    (out / "_job/dataset.json").unlink()
    forged(str(out), 0, lambda _: change)


def fake(recipe: Recipe, device: str) -> FakeEngine:
    return FakeEngine(batch_size=recipe.batch_size)


def read(reader: str, out: Path, sound: Path, place: Path) -> object:
    drawing = Drawing(device="cpu", load=fake)
    if reader in EXPORTS:
        settings = {"to": reader, "out": str(place / reader), "status": "ok,flagged", "split": "train=0.5,test=0.5"}
        return export(str(out), make_export_spec(settings))
    verbs: dict[str, Callable[[], object]] = {
        "report": lambda: report(str(out)),
        "compare": lambda: compare(str(sound), str(out), top=9).to_dict(),
        "page": lambda: compare_outputs(str(out), str(sound), str(place / "page"), top=9),
        "score": lambda: score(str(out), ["sharpness", "phash"], ScoreSpec()),
        "regenerate": lambda: regenerate(str(out), range(4), destination=str(place / "again"), drawing=drawing),
        "verify": lambda: verify(str(out), regenerate_n=2, drawing=drawing),
        "inspect": lambda: inspect_files(
            [str(next(sound.glob("images/*/*/*.png")))], text="StableDiffusionV1", dataset=str(out)
        ),
    }
    return verbs[reader]()


def refusal(reader: str, out: Path, sound: Path, place: Path) -> str:
    """Why the reader refuses the rows; nothing if it takes them. Anything but a refusal of ours goes on."""
    try:
        read(reader, out, sound, place)
    except JobError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("forge", [published, committed])
@pytest.mark.parametrize("change", STRANGE, ids=lambda change: ",".join(f"{k}={str(v)[:9]}" for k, v in change.items()))
def test_strange_rows_are_read_or_refused_in_one_line(
    change: dict[str, Any], forge: Callable[[Path, dict[str, Any]], None], sound: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    forge(out, change)
    for reader in READERS:
        assert "\n" not in refusal(reader, out, sound, tmp_path), reader
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"out", "page", "again", *EXPORTS}, "something lies where it may not"
