"""Exports of a dataset of several models: each row and each signature names the model that drew it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.exports.export import export
from latentmill.jobs.exports.spec import make_export_spec
from latentmill.jobs.outputs.score import score
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.scores.spec import ScoreSpec
from tests.harness.certificates import write_certificates
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import FakeEngine

pytestmark = pytest.mark.long


@dataclass
class OfModel(FakeEngine):
    """Pictures that differ from model to model."""

    tint: int = 0

    def _result(self, request: GenerationRequest, slot: int) -> GenerationResult:
        result = super()._result(request, slot)
        assert result.pixels is not None
        return replace(result, pixels=result.pixels ^ np.uint8(self.tint))


def engine_of_model(plan: Plan, device: str) -> OfModel:
    return OfModel(batch_size=plan.batch_size, tint=int(plan.model.digest[:2], 16))


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two prompts by a preset whose license is known and by a folder whose license is not."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "prompts.txt").write_text("one\ntwo\n")
    axes = {"model": ["embedded", str(tiny_model)], "seed": [1]}
    spec = job_spec(tiny_model, folder / "prompts.txt", folder / "out", sweep=axes)
    assert run(spec, engine_factory=engine_of_model).exit_code == 0
    return spec.out


@pytest.fixture
def rows(published: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_dataset(published).rows.to_pylist()
    assert len({(row["model"], row["model_sha256"]) for row in found}) == 2
    return found


@pytest.fixture
def write(published: str, tmp_path: Path) -> Callable[..., Path]:
    def write(to: str, **settings: Any) -> Path:
        export(published, make_export_spec({"to": to, "out": str(tmp_path / to), **settings}))
        return tmp_path / to

    return write


def test_rows_of_every_form_name_their_model(write: Callable[..., Path], rows: list[dict[str, Any]]) -> None:
    (table,) = write("jsonl").glob("*.jsonl")
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    with tarfile.open(write("webdataset") / "000000.tar") as tar:
        members = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    for told in (lines, members):
        assert [(row["model"], row["model_sha256"]) for row in told] == [
            (row["model"], row["model_sha256"]) for row in rows
        ]
    captions = json.loads((write("coco-captions") / "annotations/captions_train.json").read_text())
    assert [note["caption"] for note in captions["annotations"]] == [row["prompt"] for row in rows]


def test_a_filter_chooses_the_pictures_of_a_model(write: Callable[..., Path], rows: list[dict[str, Any]]) -> None:
    (table,) = write("jsonl", filter="model == 'embedded'").glob("*.jsonl")
    kept = [json.loads(line)["sample_id"] for line in table.read_text().splitlines()]
    assert kept == [row["sample_id"] for row in rows if row["model"] == "embedded"]


def test_the_card_lists_each_model_with_its_license(write: Callable[..., Path], rows: list[dict[str, Any]]) -> None:
    folder = write("hf")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert "license" not in yaml.safe_load(front)  # not one for all
    (line,) = [line for line in text.splitlines() if line.startswith("- models: ")]
    listed = line.split("; ")
    digests = dict.fromkeys(row["model_sha256"] for row in rows)
    assert [digest in model for digest, model in zip(digests, listed, strict=True)] == [True, True]
    assert listed[0].endswith("license `Apache-2.0`")
    assert listed[1].endswith("license not known here")
    assert "license" not in json.loads((folder / "croissant.json").read_text())


def test_each_signature_names_the_model_of_its_own_row(
    write: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    c2pa = pytest.importorskip("c2pa")
    signer = write_certificates(tmp_path / "signer")
    folder = write("jsonl", sign=str(signer.chain), key=str(signer.key))
    (table,) = folder.glob("*.jsonl")
    for row, line in zip(rows, table.read_text().splitlines(), strict=True):
        data = (folder / json.loads(line)["file_name"]).read_bytes()
        with c2pa.Reader("image/png", io.BytesIO(data)) as reader:
            told = json.loads(reader.json())
        (assertion,) = told["manifests"][told["active_manifest"]]["assertions"]
        (action,) = assertion["data"]["actions"]
        assert action["parameters"] == {"latentmill.model_sha256": row["model_sha256"]}


def test_scores_are_of_each_picture(published: str) -> None:
    (scorer,) = score(published, ["sharpness"], ScoreSpec()).scorers
    assert (scorer.scored, scorer.rows) == (4, 4)
    with Image.open(next(Path(published).glob("images/*/*/*.png"))) as picture:
        assert picture.size == (64, 64)
