"""Whatever is wrong with scores is found and told, and nothing of theirs is swept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import latentmill
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.clean import clean
from latentmill.jobs.outputs.publish import publish
from latentmill.jobs.outputs.repair import repair as heal
from latentmill.jobs.outputs.score import score
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.scores.join import open_scores
from latentmill.jobs.scores.side_files import encode_part
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.store.parquet import read_parquet
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import fake_engine
from tests.jobs.outputs.repairs import repair

pytestmark = pytest.mark.slow

PROMPTS = ["one", "two", "some nsfw", "some poison", "five", "six"]
MANIFEST = "scores/sharpness/manifest.json"


@pytest.fixture
def out(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> str:
    """Six rows, scored in three parts."""
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    rescore(out)
    return out


def rescore(out: str) -> int:
    """The parts that were made."""
    return score(out, ["sharpness"], ScoreSpec(), rows_per_part=2).scorers[0].written


def parts(out: str) -> list[str]:
    return sorted(path for path, _ in Storage.open(out).list("scores") if path != MANIFEST)


def test_what_is_as_it_was_written_is_no_defect_and_is_not_swept(out: str):
    assert len(parts(out)) == 3
    assert verify(out).defects == ()
    assert clean(out, grace_seconds=0).objects == 0
    assert verify(out).defects == ()


def test_what_a_killed_scoring_left_under_a_temporary_name_is_swept(out: str):
    before = parts(out)
    left = Path(out, "scores/sharpness", f".part-00000.{'0' * 12}.tmp")
    left.write_bytes(b"half a part")
    assert clean(out).temporary_files == 0, "it is too young"
    assert clean(out, grace_seconds=-1).temporary_files == 1
    assert (left.exists(), parts(out)) == (False, before)


def test_rows_of_strangers_are_refused_in_one_line(out: str):
    job = open_job(out)
    scores = open_scores(job.storage, job.plan.plan_hash)
    for sample_id in ("one", None):
        with pytest.raises(JobError, match="whose sample_id no job writes"):
            scores.join(pa.table({"sample_id": pa.array([sample_id], pa.string()), "pixel_sha256": ["0"]}))
    with pytest.raises(JobError, match="has not all rows"):
        scores.join(pa.table({"sample_id": ["00000006"], "pixel_sha256": ["0"]}))


def test_any_rows_in_any_order_are_joined(out: str):
    job = open_job(out)
    table = latentmill.open_dataset(out).table(["sample_id", "pixel_sha256", "sharpness"])
    expected = dict(zip(table["sample_id"].to_pylist(), table["sharpness"].to_pylist(), strict=True))
    scores = open_scores(job.storage, job.plan.plan_hash)
    for order in ([5, 0, 3], [2], [4, 4], [5, 4, 3, 2, 1, 0], []):
        rows = table.select(["sample_id", "pixel_sha256"]).take(pa.array(order, pa.int64()))
        joined = scores.join(rows)
        assert joined["sharpness"].to_pylist() == [expected[f"{number:08d}"] for number in order]
        assert joined.schema.field("sharpness") == scores.fields[0]


def change_part(out: str, change: Callable[[pa.Table], pa.Table], *, consistent: bool = True) -> None:
    """Another table in place of the second part, which the manifest names as if it were it."""
    storage, path = Storage.open(out), parts(out)[1]
    table = change(read_parquet(storage.read(path)))
    data = encode_part(table)
    storage.write(path, data)
    if consistent:
        fields = json.loads(storage.read(MANIFEST))
        fields["parts"][1] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": table.num_rows}
        fields["rows"] = sum(part["rows"] for part in fields["parts"])
        storage.write(MANIFEST, json.dumps(fields).encode())


def change_manifest(out: str, **fields: Any) -> None:
    storage = Storage.open(out)
    storage.write(MANIFEST, json.dumps(json.loads(storage.read(MANIFEST)) | fields).encode())


def twice(table: pa.Table) -> pa.Table:
    return table.take(pa.array([0, 0]))


def others(table: pa.Table) -> pa.Table:
    return table.set_column(1, "pixel_sha256", pa.array(["0" * 64] * table.num_rows))


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (lambda out: Storage.open(out).delete(parts(out)[1]), "not readable"),
        (lambda out: change_part(out, twice, consistent=False), "do not match the digest"),
        (lambda out: change_part(out, twice), "not those of the dataset"),
        (lambda out: change_part(out, others), "2 samples were made again after they were scored, first 00000002"),
        (lambda out: change_part(out, lambda table: table.slice(0, 1)), "it has 5 rows, the dataset 6"),
        (lambda out: change_part(out, lambda table: table.drop_columns(["sharpness"])), "other columns"),
        (lambda out: Storage.open(out).write(MANIFEST, b"{}"), "no manifest of scores"),
        (lambda out: change_manifest(out, plan_hash="0" * 64), "another plan"),
        (lambda out: change_manifest(out, parts=[{"path": "../x", "rows": 6, "bytes": 1, "sha256": ""}]), "none"),
        (lambda out: change_manifest(out, columns={"prompt": "float32"}), "neither sharpness nor begins"),
    ],
)
def test_damage_is_found_told_and_made_again_by_the_same_command(out: str, damage: Callable[[str], None], detail: str):
    damage(out)
    defects = verify(out).defects
    assert {defect.kind for defect in defects} == {"scores-wrong"}
    assert any(detail in defect.detail for defect in defects), defects
    report = heal(out, engine_factory=fake_engine)
    assert [(defect.kind, report.exit_code) for defect in report.unhealed] == [("scores-wrong", 1)] * len(defects)
    assert all("latentmill score" in defect.reason for defect in report.unhealed)
    rescore(out)
    assert verify(out).defects == ()


def test_damaged_scores_are_named_to_readers_of_the_dataset(out: str):
    change_part(out, twice, consistent=False)
    dataset = latentmill.open_dataset(out)
    with pytest.raises(JobError, match=r"scores/sharpness in .* is damaged: .*; heal it by: latentmill score"):
        dataset.table()
    assert dataset.table(["prompt"]).num_rows == 6, "who asks for none of them needs none of them"
    Storage.open(out).write(MANIFEST, b"{}")
    with pytest.raises(JobError, match=r"scores/sharpness in .* is damaged"):
        latentmill.open_dataset(out)


def test_a_sample_that_is_made_again_has_no_score_until_it_is_scored_again(out: str):
    repair(out, 1)
    publish(open_job(out))
    rows = list(latentmill.open_dataset(out))
    assert rows[3]["status"] == "ok"
    assert rows[3]["sharpness"] is None
    assert rows[4]["sharpness"] is not None
    (defect,) = verify(out).defects
    assert "1 samples were made again after they were scored, first 00000003" in defect.detail
    before = parts(out)
    assert rescore(out) == 1
    assert len(set(before) - set(parts(out))) == 1, "the part that is superseded is gone"
    assert latentmill.open_dataset(out)[3]["sharpness"] is not None
    assert verify(out).defects == ()
