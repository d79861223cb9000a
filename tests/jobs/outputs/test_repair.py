"""`run --retry-failed`, the whole way: what failed is made again, and the dataset is as if it never had."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from latentmill.jobs.outputs.captions import captions_path
from latentmill.jobs.outputs.clean import clean
from latentmill.jobs.outputs.publish import MANIFEST_PATH
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import KillAt, job_spec, pictures, read_dataset, run, start
from tests.jobs.outputs.repairs import healed_engine, partly_healed_engine

pytestmark = pytest.mark.slow

PROMPTS = [
    "one",
    "poison two",
    "some nsfw",
    "poison four",
    "poison five",
    "poison six",
    "seven",
    "eight",
    "poison nine",
]
Manifest = Callable[..., Path]


@pytest.fixture
def spec(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> JobSpec:
    """A job of three chunks: two that fail in part, and a last one whose only sample fails."""
    return job_spec(tiny_model, manifest(PROMPTS), tmp_path / "out", chunk_size=4)


def again(spec: JobSpec) -> JobSpec:
    return replace(spec, runtime=replace(spec.runtime, retry_failed=True))


def looks(out: str) -> tuple[object, ...]:
    """Rows and files, whoever made them and whenever."""
    dataset = read_dataset(out)
    rows = dataset.rows.to_pylist()
    for row in rows:
        row["image"] = row["image"] and re.sub(r"-r\d+-", "-", row["image"])
    manifest = {name: value for name, value in dataset.manifest.items() if name != "repairs"}
    return manifest, rows, dataset.files


def snapshot(out: str) -> dict[str, bytes]:
    storage = Storage.open(out)
    return {path: storage.read(path) for path, _ in storage.list("")}


def test_only_what_failed_is_made_again_and_the_dataset_is_as_if_it_never_had(spec: JobSpec, tmp_path: Path) -> None:
    first = run(spec)
    assert (first.exit_code, [row.prompt for row in first.failures]) == (1, [p for p in PROMPTS if "poison" in p])
    before = snapshot(spec.out)
    second = run(again(spec), engine_factory=healed_engine)
    assert (second.exit_code, second.generated, second.failures) == (0, 5, ())
    changed = {path for path, data in before.items() if snapshot(spec.out).get(path) != data}
    assert MANIFEST_PATH in changed
    assert all(path.startswith("dataset/") or path in {MANIFEST_PATH, captions_path(0)} for path in changed)
    parts = [path for path in snapshot(spec.out) if path.startswith("dataset/part")]
    assert len(parts) == 1, "a glob over the parts meets rows twice"
    assert verify(spec.out).defects == ()
    whole = replace(spec, out=str(tmp_path / "whole"))
    assert run(whole, engine_factory=healed_engine).exit_code == 0
    assert looks(spec.out) == looks(whole.out)
    finished = snapshot(spec.out)
    assert (run(again(spec)).generated, run(spec).generated) == (0, 0)
    assert snapshot(spec.out) == finished


def test_what_fails_again_changes_nothing(spec: JobSpec) -> None:
    first = run(spec)
    before = snapshot(spec.out)
    second = run(again(spec))
    assert (second.exit_code, second.generated, second.failures) == (1, 5, first.failures)
    assert snapshot(spec.out) == before


def test_repairs_add_up(spec: JobSpec) -> None:
    run(spec)
    second = run(again(spec), engine_factory=partly_healed_engine)
    assert second.counts is not None
    assert (second.exit_code, second.counts["failed"]) == (1, 3)
    assert [row.prompt for row in second.failures] == ["poison two", "poison six", "poison nine"]
    assert asdict(second)["failures"][0]["error"] == "this prompt is poison"
    third = run(again(spec), engine_factory=healed_engine)
    assert (third.exit_code, third.generated) == (0, 3)
    report = verify(spec.out)
    assert (report.defects, report.repairs) == ((), 5)


@pytest.mark.parametrize(
    ("kill_at", "at_least"),
    [
        (KillAt("before", "create", "ledger/00000/00000001.r1"), 0),
        (KillAt("after", "create", "ledger/00000/00000001.r1"), 1),
        (KillAt("before", "write", "_job/dataset"), 3),
    ],
    ids=lambda value: f"{value.when} {value.verb} {value.prefix}" if isinstance(value, KillAt) else "",
)
def test_a_repair_that_is_killed_is_gone_on_with(spec: JobSpec, tmp_path: Path, kill_at: KillAt, at_least: int) -> None:
    run(spec)
    driver = start(again(spec), tmp_path / "log", kill_at=kill_at, engine=healed_engine)
    driver.join(60)
    assert driver.exitcode == -signal.SIGKILL
    assert status(spec.out).repairs >= at_least
    plain = run(spec)
    assert (plain.generated, plain.exit_code) == (0, int(status(spec.out).repairs < 3)), "what is repaired is published"
    assert verify(spec.out).defects == ()
    assert run(again(spec), engine_factory=healed_engine).exit_code == 0
    clean(spec.out)
    assert verify(spec.out).defects == ()
    rows = read_dataset(spec.out).rows.num_rows
    assert len(list(pictures(Storage.open(spec.out)))) == rows == len(PROMPTS)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_two_drivers_repair_one_output(
    place: str, spec: JobSpec, tiny_model: Path, manifest: Manifest, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue("s3") if place == "s3" else spec.out
    spec = job_spec(tiny_model, manifest(PROMPTS), out, chunk_size=4)
    run(spec)
    with ThreadPoolExecutor(3) as pool:
        drivers = [pool.submit(run, again(spec), engine_factory=healed_engine) for _ in range(2)]
        plain = pool.submit(run, spec)
        assert [driver.result().exit_code for driver in drivers] == [0, 0]
        assert plain.result().exit_code in {0, 1}
    assert run(spec).exit_code == 0
    clean(spec.out)
    report = verify(spec.out)
    assert (report.defects, report.repairs) == ((), 3)
    assert len(list(pictures(Storage.open(spec.out)))) == len(PROMPTS)
