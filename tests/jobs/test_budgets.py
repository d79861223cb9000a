"""What a job may cost beside its pictures, counted and not timed: requests to the store, bytes, processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from latentmill.jobs.runner import run_job
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import fake_engine

REQUESTS = ("read", "write", "create", "exists", "size", "list", "delete")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each verb of the storage is called, and how many bytes are handed to it."""
    counted: Counter[str] = Counter()

    def count(verb: str) -> None:
        original = getattr(Storage, verb)

        def counting(self: Storage, path: str, *rest: object) -> object:
            counted[verb] += 1
            counted["bytes"] += sum(len(data) for data in rest if isinstance(data, bytes))
            return original(self, path, *rest)

        monkeypatch.setattr(Storage, verb, counting)

    for verb in REQUESTS:
        count(verb)
    return counted


def test_a_picture_is_one_request_and_a_chunk_four(requests: Counter[str], manifest, tiny_model: Path, tmp_path: Path):
    """Beside the plan and the dataset, which a job writes once."""
    counts = []
    for name, n_prompts in (("small", 8), ("large", 72)):
        requests.clear()
        summary = run(job_spec(tiny_model, manifest(n_prompts), tmp_path / name, chunk_size=8, batch_size=8))
        assert summary.counts == {"ok": n_prompts, "flagged": 0, "failed": 0}
        counts.append(Counter(requests))
    small, large = counts
    pictures, chunks = 64, 8
    more = {verb: large[verb] - small[verb] for verb in REQUESTS}
    assert more["write"] == pictures
    assert more["create"] == chunks
    assert more["read"] <= 2 * chunks  # asked before it is generated, and read to be published
    assert more["list"] == chunks  # that the pictures are there, before it is published
    assert more["exists"] == more["size"] == more["delete"] == 0


def test_what_is_written_is_the_pictures_and_a_little_more(
    requests: Counter[str], manifest, tiny_model: Path, tmp_path: Path
):
    out = tmp_path / "out"
    run(job_spec(tiny_model, manifest(64), out, chunk_size=32, batch_size=8))
    pictures = sum(path.stat().st_size for path in (out / "images").rglob("*.png"))
    beside = requests["bytes"] - pictures
    assert 0 < beside < 64 * 3000


@pytest.mark.cluster
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
def test_a_job_on_ray_starts_its_actors_and_no_other_process(manifest, tiny_model: Path, tmp_path: Path):
    """Twelve chunks on two cores: two actors, which also finish what they sample."""
    from ray._private.state import actors

    from latentmill.jobs.executors.ray_cluster import connect

    connection = connect(None)
    try:
        spec = job_spec(tiny_model, manifest(24), tmp_path / "out", executor="ray")
        summary = run_job(spec, engine_factory=fake_engine)
        classes = Counter(actor["ActorClassName"] for actor in actors().values())
    finally:
        connection.close()
    assert summary.exit_code == 0
    assert classes == {"WorkerProcess": 2}
