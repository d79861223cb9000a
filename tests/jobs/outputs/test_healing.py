"""`repair`: a damaged output comes back bit for bit, or what does not is named with the reason."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.ledger import record_path, repair_path
from latentmill.jobs.ledger.records import decode_record
from latentmill.jobs.outputs.captions import captions_path
from latentmill.jobs.outputs.publish import MANIFEST_PATH
from latentmill.jobs.outputs.repair import RepairReport, repair
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.show.report import report
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.jobs.driver import PROCESSES, job_spec, pictures, run
from tests.jobs.fakes import FakeEngine
from tests.jobs.outputs.repairs import healed_engine
from tests.jobs.outputs.repairs import repair as retry
from tests.jobs.traps import KillAt, arm

pytestmark = pytest.mark.slow

PROMPTS = ["one", "two", "some nsfw", "some poison", "five", "six", "seven"]
Manifest = Callable[..., Path]


def files_of(out: Path | str) -> dict[str, bytes]:
    """Every file, temporary ones left out."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def heal(out: Path | str) -> RepairReport:
    return repair(str(out), engine_factory=healed_engine)


@pytest.fixture
def out(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> Path:
    """A small finished job in which a row was blanked, one failed and was made again, and no model is needed."""
    run(job_spec(tiny_model, manifest(PROMPTS), tmp_path / "out", chunk_size=4))
    assert retry(str(tmp_path / "out"), 0).outcome == "committed"
    run(job_spec(tiny_model, manifest(PROMPTS), tmp_path / "out", chunk_size=4))
    assert verify(str(tmp_path / "out")).defects == ()
    return tmp_path / "out"


@pytest.fixture(scope="module")
def large(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures of a real model, some of them flagged and blanked, with marks of their own."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "prompts.txt").write_text("".join(f"a circle, number {number}\n" for number in range(200)))
    spec = job_spec(
        tiny_model,
        folder / "prompts.txt",
        folder / "out",
        num_inference_steps=1,
        sampler="euler_a",
        guidance_scale=3.3,
        chunk_size=16,
        batch_size=4,
        nsfw_threshold=0.0035,
    )
    assert run(spec, engine_factory=load_engine).exit_code == 0
    return folder / "out"


def flagged(out: Path) -> int:
    return sum(decode_record(path.read_bytes()).counts()["flagged"] for path in (out / "ledger").rglob("*.parquet"))


def damage(out: Path, chooser: random.Random) -> int:
    """20 files of all kinds: flipped, cut short, empty, gone, swapped, replaced; parts and manifest too."""
    chosen = [out / path for path, _ in chooser.sample(sorted(pictures(Storage.open(str(out)))), 18)]
    for path in chosen[:5]:
        data = bytearray(path.read_bytes())
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        path.write_bytes(data)
    for path in chosen[5:8]:
        path.write_bytes(path.read_bytes()[: chooser.randrange(1, 200)])
    chosen[8].write_bytes(b"")
    for path in chosen[9:13]:
        path.unlink()
    for first, second in (chosen[13:15], chosen[15:17]):
        data, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(data)
    chosen[17].unlink()
    chosen[17].symlink_to(out / "nowhere")
    (part,) = (out / "dataset").iterdir()
    part.write_bytes(part.read_bytes()[:-40] + b"\0" * 40)
    (out / MANIFEST_PATH).unlink()
    return 20


@pytest.mark.long
def test_two_hundred_pictures_with_twenty_damaged_files_come_back_bit_for_bit(large: Path, tmp_path: Path) -> None:
    before = files_of(large)
    assert status(str(large)).counts == {"ok": 200 - flagged(large), "flagged": flagged(large), "failed": 0}
    assert 20 < flagged(large) < 180, "pictures of both kinds are among those that are damaged"
    out = tmp_path / "out"
    shutil.copytree(large, out)
    damage(out, random.Random(5))
    assert files_of(out) != before
    found = verify(str(out)).defects
    assert len([defect for defect in found if defect.kind.startswith("image")]) == 18
    healed = repair(str(out), engine_factory=load_engine)
    assert (healed.exit_code, healed.unhealed, len(healed.healed)) == (0, (), len(found))
    assert 18 <= healed.generated <= 20
    assert files_of(out) == before
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert verify(str(out)).defects == ()
    assert repair(str(out), engine_factory=no_engine).defects == 0


def no_engine(plan: Plan, device: str) -> FakeEngine:
    raise AssertionError("the model was loaded for nothing")


@pytest.mark.parametrize(
    "path", ["dataset", MANIFEST_PATH, captions_path(0), "manifest of another format", "stray part", "stale"]
)
def test_what_was_published_is_published_again_without_the_model(path: str, out: Path) -> None:
    before = files_of(out)
    match path:
        case "dataset":
            (part,) = (out / "dataset").iterdir()
            part.write_bytes(part.read_bytes()[::-1])
        case "manifest of another format":
            (out / MANIFEST_PATH).write_text(json.dumps({"format": 9}))
        case "stray part":
            (out / "dataset/part-00001-0123456789abcdef.parquet").write_bytes(b"x")
        case "stale":
            manifest = json.loads((out / MANIFEST_PATH).read_text())
            (out / MANIFEST_PATH).write_text(json.dumps(manifest | {"repairs": 0}))
        case _:
            (out / path).unlink()
    assert verify(str(out)).exit_code == 1
    healed = repair(str(out), engine_factory=no_engine)
    assert (healed.exit_code, healed.generated, len(healed.healed)) == (0, 0, 1)
    assert files_of(out) == before


def test_every_picture_comes_back_under_the_policy_of_its_row(out: Path) -> None:
    """Among them one that was blanked, and one that a retry made."""
    before = files_of(out)
    for path, _ in pictures(Storage.open(str(out))):
        (out / path).unlink()
    healed = repair(str(out), engine_factory=healed_engine)
    assert (healed.exit_code, len(healed.healed)) == (0, len(PROMPTS))
    assert files_of(out) == before


def test_a_picture_is_made_in_the_slot_that_its_row_names(out: Path) -> None:
    """Whatever batches its chunk's samples went into: neighbours that were refused had left them, for one."""
    job = open_job(str(out))
    seen: list[tuple[int, int]] = []

    class Slots(FakeEngine):
        def generate(self, requests):
            assert len(requests) == self.batch_size == 2
            seen.extend((slot, request.seed) for slot, request in enumerate(requests))
            return super().generate(requests)

    rows = decode_record((out / record_path(1)).read_bytes()).table.to_pylist()
    assert [row["batch_slot"] for row in rows] == [0, 1, 0]
    for row in rows:
        (out / row["image"]).unlink()
    assert repair(str(out), engine_factory=lambda plan, _: Slots(batch_size=plan.batch_size)).exit_code == 0
    assert {(row["batch_slot"], row["seed"]) for row in rows} <= set(seen)
    assert len(seen) == 4
    assert job.plan.batch_size == 2


class ElsewhereEngine(FakeEngine):
    """Another machine."""


def elsewhere(plan: Plan, device: str) -> ElsewhereEngine:
    return ElsewhereEngine(batch_size=plan.batch_size, execution_class="elsewhere")


class ChangedEngine(FakeEngine):
    """The same machine, with code that draws something else."""

    def _result(self, request, slot):
        from dataclasses import replace

        return super()._result(replace(request, seed=request.seed + 1), slot)


def test_what_cannot_be_made_again_is_named_with_the_reason(out: Path, tiny_model: Path) -> None:
    path = next(pictures(Storage.open(str(out))))[0]
    (out / path).unlink()
    (part,) = (out / "dataset").iterdir()
    whole = part.read_bytes()
    part.write_bytes(b"")

    def reasons(report: RepairReport) -> list[tuple[str, str]]:
        assert report.exit_code == 1
        return [(defect.path, defect.reason) for defect in report.unhealed]

    ((where, why),) = reasons(repair(str(out), engine_factory=elsewhere))
    assert (where, "its bits are those of fake, and this is elsewhere" in why) == (path, True)
    assert part.read_bytes() == whole, "the rest is healed all the same"
    changed = lambda plan, _: ChangedEngine(batch_size=plan.batch_size)  # noqa: E731
    ((where, why),) = reasons(repair(str(out), engine_factory=changed))
    assert (where, why.startswith("made again, its file is another one")) == (path, True)
    broken = lambda plan, _: FakeEngine(batch_size=plan.batch_size, broken=True)  # noqa: E731
    ((where, why),) = reasons(repair(str(out), engine_factory=broken))
    assert (where, "the device is lost" in why) == (path, True)
    assert not (out / path).exists()
    weights = tiny_model / "unet/diffusion_pytorch_model.safetensors"
    hidden = weights.rename(weights.with_name("hidden"))
    try:
        ((where, why),) = reasons(repair(str(out)))
    finally:
        hidden.rename(weights)
    assert (where, why.startswith("the model is not at hand: ")) == (path, True)
    (out / path).mkdir()
    ((where, why),) = reasons(heal(out))
    assert (where, why) == (path, "a folder lies in its place: move it away, and run the repair again")
    (out / path).rmdir()
    assert heal(out).exit_code == 0


@pytest.mark.parametrize("harm", ["flipped", "gone", "retry gone"])
def test_a_damaged_ledger_is_named_and_nothing_is_told_from_it(harm: str, out: Path) -> None:
    record = out / record_path(0)
    (part,) = (out / "dataset").iterdir()
    match harm:
        case "flipped":
            data = bytearray(record.read_bytes())
            data[100] ^= 1
            record.write_bytes(data)
        case "gone":
            record.unlink()
        case _:
            (out / "ledger/00000/00000000.r1.parquet").unlink()
    after = files_of(out)
    healed = heal(out)
    assert (healed.exit_code, healed.healed) == (1, ())
    if harm != "retry gone":
        assert {defect.path for defect in healed.unhealed} <= {record_path(0), repair_path(0, 1)}
        part.write_bytes(b"damaged too")
        kinds = {defect.kind: defect.reason for defect in heal(out).unhealed}
        assert "ledger is damaged" in kinds["part-damaged"]
        part.write_bytes(after[part.relative_to(out).as_posix()])
    else:
        ((kind, reason),) = [(defect.kind, defect.reason) for defect in healed.unhealed]
        assert (kind, "includes 1 repair records and the ledger has 0" in reason) == ("dataset-wrong", True)
    assert files_of(out) == after


def _heal_and_die(out: str, kill_at: KillAt) -> None:
    arm(kill_at)
    repair(out, engine_factory=healed_engine)


POINTS = [
    KillAt("before", "write", "images/", 1),
    KillAt("after", "write", "images/", 1),
    KillAt("before", "write", "images/", 3),
    KillAt("before", "write", "dataset/part"),
    KillAt("after", "write", "dataset/part"),
    KillAt("after", "write", captions_path(0)),
    KillAt("before", "write", MANIFEST_PATH),
    KillAt("after", "write", MANIFEST_PATH),
]


@pytest.mark.parametrize("kill_at", POINTS, ids=lambda point: f"{point.when} {point.verb} {point.prefix} {point.nth}")
def test_a_repair_that_is_killed_is_harmless_and_the_next_one_finishes(kill_at: KillAt, out: Path) -> None:
    before = files_of(out)
    for number, (path, _) in enumerate(sorted(pictures(Storage.open(str(out))))[-4:]):
        (out / path).write_bytes(b"") if number % 2 else (out / path).unlink()
    (out / captions_path(0)).unlink()
    for part in (out / "dataset").iterdir():
        part.write_bytes(b"x")
    (out / MANIFEST_PATH).write_bytes(b"{")
    process = PROCESSES.Process(target=_heal_and_die, args=(str(out), kill_at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert heal(out).exit_code == 0
    assert files_of(out) == before


def test_two_repairs_at_once_agree(out: Path) -> None:
    before = files_of(out)
    for path, _ in sorted(pictures(Storage.open(str(out))))[-3:]:
        (out / path).unlink()
    (out / MANIFEST_PATH).unlink()
    processes = [
        PROCESSES.Process(target=repair, args=(str(out),), kwargs={"engine_factory": healed_engine}) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert files_of(out) == before


def test_a_report_counts_what_it_cannot_read_and_names_the_remedy(out: Path) -> None:
    lost, altered, other = [path for path, _ in sorted(pictures(Storage.open(str(out))))[:3]]
    (out / lost).unlink()
    (out / altered).write_bytes((out / other).read_bytes())  # a whole picture of the right size, of another row
    summary = report(str(out))
    assert (summary.unreadable, summary.gallery.unreadable) == (2, 2)
    for part in (out / "dataset").iterdir():
        part.unlink()
    with pytest.raises(Exception, match="latentmill repair"):
        report(str(out))
