"""A real cluster's own page for Prometheus says what is in the dataset, over all runs of a job."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from latentmill.jobs.executors.metrics import METRICS
from latentmill.jobs.executors.ray_metrics import EXPORTED_PREFIX, output_label
from latentmill.jobs.job import open_job
from latentmill.jobs.stages import stages_of
from latentmill.jobs.store.storage import Storage
from tests.harness.cluster import Cluster, cluster
from tests.jobs.driver import job_spec, read_dataset, start
from tests.jobs.executors.test_cluster import GATE, paced_engine
from tests.jobs.fakes import fake_engine

pytestmark = pytest.mark.cluster

PROMPTS = ["a circle", "some nsfw", "some poison", "a square"]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While it is not there, a chunk takes a second."""
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def nodes(gate: Path) -> Iterator[Cluster]:
    """Its processes tell their node every second, not every ten."""
    settings = {"RAY_metrics_report_interval_ms": "1000", GATE: str(gate)}
    with cluster(head_cpus=2, dashboard=True, environment=settings) as nodes:
        yield nodes


class Page:
    """What Prometheus would read: the targets that Ray lists, and what they say of one output, over all drivers."""

    def __init__(self, nodes: Cluster, out: str) -> None:
        [self._list] = Path(nodes.folder).glob("r/prom_metrics_service_discovery.json")
        self._output = output_label(out, open_job(out).plan.plan_hash)
        self.seen: dict[str, Counter[str]] = {}
        self.kinds: dict[str, str] = {}

    def read(self) -> None:
        """Again. `seen` has the values of each metric by its first own label."""
        self.seen = {name: Counter() for name in METRICS}
        for target in json.loads(self._list.read_text())[0]["targets"]:
            try:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
            except urllib.error.URLError:  # as to Prometheus, it is down: one of Ray's own processes starts late
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    name = sample.name.removeprefix(EXPORTED_PREFIX)
                    if sample.name.startswith(EXPORTED_PREFIX) and sample.labels.get("output") == self._output:
                        labels = METRICS[name].labels
                        self.seen[name][sample.labels[labels[0]] if labels else ""] += sample.value
                        self.kinds[name] = family.type

    def wait_for(self, true) -> None:
        deadline = time.monotonic() + 60  # a few seconds where nothing else runs
        while True:
            self.read()
            if true(self.seen):
                return
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.3)


def test_the_counts_of_all_runs_of_a_job_are_the_rows_of_its_dataset(
    nodes: Cluster, gate: Path, tiny_model: Path, manifest, tmp_path: Path
):
    out, log = str(tmp_path / "out"), tmp_path / "log"
    spec = job_spec(tiny_model, manifest(PROMPTS * 50), out, executor="ray", address=nodes.address)
    first = start(spec, log, engine=paced_engine, environment=nodes.client_environment)
    deadline = time.monotonic() + 200
    while not list(Storage.open(out).list("ledger")):
        assert first.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    page = Page(nodes, out)
    page.wait_for(lambda seen: seen["latentmill_images_total"]["ok"] > 0)
    assert page.seen["latentmill_workers"].total() == 2
    assert 2 <= page.seen["latentmill_chunks_in_flight"][""] <= 8
    assert page.seen["latentmill_chunks_queued"][""] > 0
    assert 0 < page.seen["latentmill_images_left"][""] < 200
    os.kill(first.pid, signal.SIGINT)
    first.join(60)
    assert first.exitcode == 130
    gate.touch()
    page.read()  # the driver told the rest when it ended
    rows = Counter()
    ledger = open_job(out).ledger
    for chunk in range(100):
        record = ledger.read(chunk)
        rows.update(record.counts() if record is not None else {})
    assert 0 < rows.total() < 200
    assert page.seen["latentmill_images_total"] == rows
    for _ in range(2):  # the rest, and then nothing
        again = start(spec, log, engine=paced_engine, environment=nodes.client_environment)
        again.join(120)
        assert again.exitcode == 1, log.read_text()  # some samples failed
    page.read()
    statuses = Counter(read_dataset(out).rows.column("status").to_pylist())
    assert page.seen["latentmill_images_total"] == statuses == {"ok": 100, "flagged": 50, "failed": 50}
    assert page.seen["latentmill_chunks_total"] == {"committed": 100}
    in_records: Counter[str] = Counter()
    for chunk in range(100):
        in_records.update(stages_of(ledger.read(chunk).metadata))
    seconds = page.seen["latentmill_stage_seconds_total"]
    assert seconds.pop("commit") > 0
    assert seconds == pytest.approx(in_records, abs=0.1)
    assert 1 < seconds["sample"] <= page.seen["latentmill_worker_seconds_total"].total()
    assert {name: page.kinds[name] for name in page.kinds} == {name: METRICS[name].kind for name in page.kinds}


def test_a_worker_that_dies_is_counted_on_its_host(nodes: Cluster, tiny_model: Path, manifest, tmp_path: Path):
    out, log = str(tmp_path / "rough"), tmp_path / "log"
    prompts = manifest(["a circle", "a segfault", "a square", "a star"])
    spec = job_spec(tiny_model, prompts, out, executor="ray", address=nodes.address)
    driver = start(spec, log, engine=fake_engine, environment=nodes.client_environment)
    driver.join(200)
    assert driver.exitcode == 1, log.read_text()
    page = Page(nodes, out)
    page.read()
    assert page.seen["latentmill_worker_deaths_total"] == {os.uname().nodename: 2 + 2 * 3}  # pooled; the chunk, the row
    assert page.seen["latentmill_images_total"] == {"ok": 3, "failed": 1}
