"""One history: a job, two drivers on one output, a storm over them, and the audit once both say it is done."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from latentmill.jobs.store.storage import Storage
from tests.harness.processes import Family
from tests.soak.audit import Finished, audit, neighbours, run_cli
from tests.soak.chaos import Climate, Storm
from tests.soak.drivers import Driver
from tests.soak.jobs import Model, SoakJob, embedded_job, fake_job
from tests.soak.report import Tally
from tests.soak.supervisor import Supervisor
from tests.soak.watch import Watch

_TICK = 0.1
_SURPRISES = 12
_PATIENCE = 300.0
"""Seconds without any disturbance in which a new chunk has to be committed, or a driver to end."""

NEIGHBOURS = (
    "out.txt",
    "out-other/ledger/00000/00000000.parquet",
    "ou",
    "images/00000/00000000-0000000000000000/x.png",
)
"""Objects beside OUT whose names a careless prefix would take for OUT's."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What all histories of a soak share."""

    supervisor: Supervisor
    family: Family
    folder: Path
    climate: Climate
    seed: int
    samples: dict[Model, int]
    storm_seconds: float
    """How long a storm lasts at most; then the drivers may finish in peace."""
    least_kills: int
    """No storm ends before there were so many in all, however slow the machine is."""


def play(scene: Scene, number: int, model: Model, end: float, tally: Tally) -> None:
    """Play history `number`, whose storm is over at the monotonic time `end` at the latest, and audit it."""
    began = time.monotonic()
    chooser = random.Random(f"{scene.seed} {number}")
    folder = scene.folder / f"h{number:03d}"
    folder.mkdir()
    out = f"s3://test/soak/h{number:03d}/out"
    job = _job(scene, folder, model, chooser, number)
    reference, reference_exit_code = _undisturbed(scene, job, folder, number)
    beside = Storage.open(out.removesuffix("/out"))
    for name in NEIGHBOURS:
        beside.write(name, f"{name} belongs to somebody else".encode())
    before = neighbours(out)
    watch = Watch(out)
    watch.start()
    drivers = [_driver(scene, job, out, folder / f"driver{which}") for which in range(2)]
    storm = Storm(scene.supervisor.cluster, scene.family, drivers, out, folder, scene.climate, chooser)
    missing = scene.least_kills - sum(tally.kills.values())
    stuck = _weather_through(scene, storm, drivers, watch, min(end, time.monotonic() + scene.storm_seconds), missing)
    storm.end()
    watch.finish()
    (folder / "storm.txt").write_text("\n".join(storm.events) + "\n")
    if stuck:
        found = {"liveness": [f"stuck: {[dict(driver.endings) for driver in drivers]}", *watch.violations]}
        for driver in drivers:
            driver.send(signal.SIGKILL)
    else:
        found = audit(
            Finished(
                job=job,
                out=out,
                reference=reference,
                reference_exit_code=reference_exit_code,
                exit_codes=tuple(driver.exit_code for driver in drivers if driver.exit_code is not None),
                watch=watch,
                neighbours=before,
                working_folders=tuple(driver.folder / "cwd" for driver in drivers),
            )
        )
        tally.audits += 1
    tally.violations += [f"history {number} ({model}) {name}: {what}" for name, all_ in found.items() for what in all_]
    tally.model_seconds[model] += time.monotonic() - began
    tally.samples += scene.samples[model]
    _count(tally, number, model, storm, watch)


def _count(tally: Tally, number: int, model: Model, storm: Storm, watch: Watch) -> None:
    tally.histories[model] += 1
    tally.chunks += watch.records
    tally.fake_chunks += watch.records if model == "fake" else 0
    tally.looks += watch.looks
    tally.kills.update(storm.kills)
    tally.stops.update(storm.stops)
    tally.cleanings.update(storm.cleanings)
    for driver in storm.drivers:
        tally.endings.update(driver.endings)
        tally.complaints.update(driver.complaints)
        tally.surprises += [f"history {number}, {driver.folder.name}: {words}" for words in driver.surprises]


def _weather_through(
    scene: Scene, storm: Storm, drivers: list[Driver], watch: Watch, end: float, least_kills: int
) -> bool:
    """Until both drivers are done; True if they are not, long after the storm, or keep ending in unknown ways."""
    calm, progress, seen = False, 0.0, (0, 0)
    next_reap = 0.0
    while not all(driver.done for driver in drivers):
        now = time.monotonic()
        scene.supervisor.supervise()
        for driver in drivers:
            driver.supervise()
        if now < end or sum(storm.kills.values()) < least_kills:
            storm.tick()
        elif not calm:
            storm.calm()
            calm = True
        if seen != (seen := (watch.records, sum(driver.done for driver in drivers))) or not calm:
            progress = now
        if now - progress > _PATIENCE:
            return True
        if any(len(driver.surprises) > _SURPRISES for driver in drivers):
            return True
        if now > next_reap:  # it looks at every process of the machine
            scene.family.reap()
            next_reap = now + 2.0
        time.sleep(_TICK)
    storm.calm()
    return False


def _job(scene: Scene, folder: Path, model: Model, chooser: random.Random, number: int) -> SoakJob:
    if model == "fake":
        return fake_job(folder, chooser, scene.samples["fake"])
    return embedded_job(folder, number % 2, scene.samples["embedded"])


def _undisturbed(scene: Scene, job: SoakJob, folder: Path, number: int) -> tuple[str, int]:
    """The same plan on a local disk; the shipped model's two jobs come again, and are run once."""
    out = folder / "calm" if job.model == "fake" else scene.folder / f"calm-embedded-{number % 2}"
    code, answer, words = run_cli(job, str(out))
    if answer is None or answer["counts"] is None or not answer["counts"]["failed"] or not answer["counts"]["flagged"]:
        raise RuntimeError(f"the undisturbed run is not what it should be: {code}, {answer}, {words}")
    return str(out), code


def _driver(scene: Scene, job: SoakJob, out: str, folder: Path) -> Driver:
    cluster = scene.supervisor.cluster
    flags = ("--executor", "ray", "--address", cluster.address, "--num-actors", "2")
    return Driver(scene.family, job.command("run", out, *flags), cluster.environment, folder)
