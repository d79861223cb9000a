"""Outputs of older formats, as the versions then wrote them: read, verified, shown, healed; not gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.errors import OutputConflictError
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.clean import clean
from latentmill.jobs.outputs.publish import OLD_MANIFEST_PATH
from latentmill.jobs.outputs.repair import repair
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.show.report import report
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import fake_engine

COUNTS = {"ok": 2, "flagged": 1, "failed": 1}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Four samples of the fake engine; the manifest had a column `model` of its own."""
    shutil.unpack_archive(Path(__file__).parent / "data/format2.zip", tmp_path / "old")
    return tmp_path / "old"


def test_it_is_read_verified_and_shown(old: Path) -> None:
    assert (status(str(old)).state, status(str(old)).counts) == ("published", COUNTS)
    assert status(str(old), deep=True).chunks_committed == 2
    checked = verify(str(old))
    assert (checked.defects, checked.images_checked, checked.parts_checked) == ((), 3, 1)
    assert report(str(old)).samples_shown == 4
    assert clean(str(old), grace_seconds=0).objects == 0
    assert open_job(str(old)).plan.record_schema.names[-1] == "model"


def test_it_is_healed_as_it_was(old: Path) -> None:
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    (old / OLD_MANIFEST_PATH).unlink()
    pictures = sorted((old / "images").rglob("*.png"))
    pictures[0].unlink()
    pictures[1].write_bytes(b"")
    healed = repair(str(old), engine_factory=fake_engine)
    assert (healed.exit_code, len(healed.healed)) == (0, 3)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_it_is_not_gone_on_with(old: Path, tiny_model: Path, manifest: Callable[..., Path]) -> None:
    before = read_dataset(str(old))
    with pytest.raises(OutputConflictError, match="format 2, which this version reads but does not go on with"):
        run(job_spec(tiny_model, manifest(2), old))
    assert read_dataset(str(old)) == before


@pytest.fixture
def unmixed(tmp_path: Path) -> Path:
    """Format 3: twelve samples of four groups, each of which was cut into chunks of up to four by itself."""
    shutil.unpack_archive(Path(__file__).parent / "data/format3.zip", tmp_path / "unmixed")
    return tmp_path / "unmixed"


def test_chunks_of_format_3_have_one_loop_each(unmixed: Path) -> None:
    plan = open_job(str(unmixed)).plan
    chunks = [plan.samples_of_chunk(chunk) for chunk in range(plan.n_chunks)]
    loops = [{(sample.request.num_inference_steps, sample.request.guided) for sample in chunk} for chunk in chunks]
    assert loops == [{(2, False)}, {(2, True)}, {(3, False)}, {(3, True)}]
    counts = {"ok": 8, "flagged": 2, "failed": 2}
    assert (status(str(unmixed)).state, status(str(unmixed)).counts) == ("published", counts)
    checked = verify(str(unmixed))
    assert (checked.defects, checked.images_checked, checked.parts_checked) == ((), 10, 1)


def test_an_output_of_format_3_is_healed_as_it_was(unmixed: Path) -> None:
    before = {path: path.read_bytes() for path in unmixed.rglob("*") if path.is_file()}
    pictures = sorted((unmixed / "images").rglob("*.png"))
    pictures[1].unlink()
    pictures[-1].write_bytes(b"")
    next((unmixed / "dataset").iterdir()).unlink()
    healed = repair(str(unmixed), engine_factory=fake_engine)
    assert (healed.exit_code, len(healed.healed), healed.generated) == (0, 3, 2)
    assert {path: path.read_bytes() for path in unmixed.rglob("*") if path.is_file()} == before


def test_an_output_of_format_3_is_not_gone_on_with(
    unmixed: Path, tiny_model: Path, manifest: Callable[..., Path]
) -> None:
    before = read_dataset(str(unmixed))
    with pytest.raises(OutputConflictError, match="format 3, which this version reads but does not go on with"):
        run(job_spec(tiny_model, manifest(2), unmixed))
    assert read_dataset(str(unmixed)) == before
