"""Kill the driver at random, interrupt it, run two at once: the dataset is the undisturbed one, and little is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.outputs.verify import verify
from tests.jobs.crash_points import CHUNKS, PROMPTS, SETTINGS
from tests.jobs.driver import Dataset, KillAt, committed_generations, job_spec, read_dataset, run, start
from tests.jobs.fakes import slow_engine


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(prompts: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = str(tmp_path_factory.mktemp("undisturbed") / "out")
    assert run(job_spec(tiny_model, prompts, out, **SETTINGS)).exit_code == 1
    return read_dataset(out)


def assert_same(out: str, undisturbed: Dataset) -> None:
    dataset = read_dataset(out)
    assert dataset.manifest == undisturbed.manifest
    assert dataset.rows.equals(undisturbed.rows)
    assert dataset.files == undisturbed.files
    assert verify(out).defects == ()


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(
    prompts: Path, tiny_model: Path, undisturbed: Dataset, tmp_path: Path
) -> None:
    seed = int(os.environ.get("LATENTMILL_TEST_SEED", random.randrange(2**32)))
    print(f"LATENTMILL_TEST_SEED={seed}")
    moments = random.Random(seed)
    kills = 0
    for history in range(2):
        out, log = str(tmp_path / f"out{history}"), tmp_path / "log"
        spec = job_spec(tiny_model, prompts, out, **SETTINGS)
        for _ in range(12):
            driver = start(spec, log, engine=slow_engine)
            driver.join(moments.uniform(0.05, 0.5))
            if driver.exitcode is not None:
                break
            driver.kill()
            driver.join()
            kills += 1
        assert driver.exitcode in {1, -signal.SIGKILL}, log.read_text()
        assert run(spec).exit_code == 1
        assert_same(out, undisturbed)
    assert kills >= 2


def test_a_killed_driver_loses_at_most_the_chunks_in_flight(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    spec = job_spec(tiny_model, prompts, out, **SETTINGS)
    driver = start(spec, tmp_path / "log", kill_at=KillAt("after", "create", "ledger/", 3))
    driver.join(120)
    again = run(spec)
    assert again.generated <= (CHUNKS - 3) * 4
    assert again.generated >= 18 - 3 * 4 - 4


def test_resuming_a_finished_job_generates_nothing(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    spec = job_spec(tiny_model, prompts, out, **SETTINGS)
    first = run(spec)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(out).rglob("*") if path.is_file()}

    def no_engine(*_: object) -> None:
        pytest.fail("a model was loaded")

    again = run(spec, engine_factory=no_engine)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(out).rglob("*") if path.is_file()}
    assert (first.generated, again.generated) == (18, 0)
    assert again.exit_code == first.exit_code == 1
    assert again.counts == first.counts == {"ok": 14, "flagged": 2, "failed": 2}
    assert before == after


def test_two_drivers_at_once_on_one_output(
    prompts: Path, tiny_model: Path, undisturbed: Dataset, tmp_path: Path
) -> None:
    out, log = str(tmp_path / "out"), tmp_path / "log"
    spec = job_spec(tiny_model, prompts, out, **SETTINGS)
    drivers = [start(spec, log, engine=slow_engine) for _ in range(2)]
    for driver in drivers:
        driver.join(120)
    assert [driver.exitcode for driver in drivers] == [1, 1], log.read_text()
    assert committed_generations(log) >= 18
    assert_same(out, undisturbed)


def test_interrupted_once_it_stops_after_the_chunks_in_flight(
    prompts: Path, tiny_model: Path, undisturbed: Dataset, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    spec = job_spec(tiny_model, prompts, str(out), **SETTINGS)
    driver = start(spec, log, engine=slow_engine)
    wait_for(lambda: any((out / "ledger").rglob("*.parquet")))
    os.kill(driver.pid, signal.SIGINT)
    driver.join(60)
    assert driver.exitcode == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    committed = len(list((out / "ledger").rglob("0*.parquet")))
    assert 1 <= committed < CHUNKS
    assert not (out / "dataset").exists()
    images = {path.parent.name for path in (out / "images").rglob("*.png")}
    assert len(images) == log.read_text().count("begin") == committed, "a chunk in flight was thrown away"
    assert run(spec).generated == 18 - 4 * committed
    assert_same(str(out), undisturbed)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
