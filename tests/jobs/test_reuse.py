"""`--reuse`: what another output holds is not drawn again, and the dataset is the one of a run that drew it all."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.job_file import resolve
from latentmill.jobs.ledger.ledger import record_path
from latentmill.jobs.ledger.records import encode_record
from latentmill.jobs.outputs.clean import clean
from latentmill.jobs.outputs.repair import repair
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import Plan, draft_plan
from latentmill.jobs.reuse_preview import preview_reuse
from latentmill.jobs.runner import RunSummary
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.jobs.driver import Dataset, KillAt, job_spec, read_dataset, run, start
from tests.jobs.fakes import FakeEngine, fake_engine

pytestmark = pytest.mark.long

PROMPTS = ["one", "some nsfw", "poison three", "four", "five"]
NIGHT = {"guidance_scale": [3, 5, 7.5], "seed": [0, 1, 2]}
TONIGHT = {"guidance_scale": [3, 5, 9], "seed": [0, 1, 2]}
NEW, HELD, POISON = 15, 24, 9
"""Of the 45 cells of tonight: those of the new value, those of the old values with a picture, and those that fail."""
Manifest = Callable[..., Path]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def tonights(model: Path, prompts: Path, out: Path) -> JobSpec:
    return job_spec(model, prompts, out, sweep=TONIGHT, chunk_size=8)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Last night's output, and tonight's as it is without reuse."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(job_spec(tiny_model, prompts, folder / "last", sweep=NIGHT, chunk_size=7)).exit_code == 1
    assert run(tonights(tiny_model, prompts, folder / "alone")).exit_code == 1
    return folder


@pytest.fixture
def last_night(finished: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(finished / "last", tmp_path / "last"))


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> Dataset:
    return read_dataset(str(finished / "alone"))


@pytest.fixture
def spec(tiny_model: Path, prompts: Path, tmp_path: Path) -> JobSpec:
    """Tonight's job, which reuses nothing yet."""
    return tonights(tiny_model, prompts, tmp_path / "tonight")


def reusing(spec: JobSpec, *donors: str | Path) -> JobSpec:
    return replace(spec, runtime=replace(spec.runtime, reuse=tuple(map(str, donors))))


def snapshot(out: str) -> dict[str, bytes]:
    storage = Storage.open(out)
    return {path: storage.read(path) for path, _ in storage.list("")}


def assert_same(out: str, undisturbed: Dataset, reused: int) -> None:
    """The dataset is the undisturbed one, and so many rows say that they are taken."""
    dataset = read_dataset(out)
    assert dataset.files == undisturbed.files
    assert dataset.rows.drop_columns(["reused_from"]).equals(undisturbed.rows.drop_columns(["reused_from"]))
    assert dataset.manifest == undisturbed.manifest
    assert dataset.rows.num_rows - dataset.rows.column("reused_from").null_count == reused
    assert verify(out).defects == ()


def noted(summary: RunSummary, text: str) -> bool:
    return any(text in note for note in summary.notes)


def test_one_changed_axis_value_costs_one_axis_value(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    before = snapshot(last_night)
    summary = run(reusing(spec, last_night))
    assert (summary.exit_code, summary.reused, summary.generated) == (1, HELD, 45 - HELD)
    assert_same(spec.out, undisturbed, HELD)
    assert snapshot(last_night) == before
    rows = read_dataset(spec.out).rows.to_pylist()
    donor = {row["sample_id"]: row for row in read_dataset(last_night).rows.to_pylist()}
    for row in rows:
        assert (row["reused_from"] is None) == (row["guidance_scale"] == 9 or row["status"] == "failed")
        if row["reused_from"] is not None:
            source = Path(row["reused_from"])
            assert source.is_relative_to(last_night)
            asked = ("prompt", "seed", "guidance_scale")
            assert [row[name] for name in asked] == [donor[source.stem][name] for name in asked]
            assert source.read_bytes() == Path(spec.out, _place(spec.out, row["sample_id"])).read_bytes()
    assert {row["status"] for row in rows if row["reused_from"]} == {"ok", "flagged"}


def _place(out: str, sample_id: str) -> Path:
    (found,) = Path(out).glob(f"images/*/*/{sample_id}.png")
    return found.relative_to(out)


def test_a_finished_job_takes_and_draws_nothing(spec: JobSpec, last_night: str) -> None:
    run(reusing(spec, last_night))
    before = snapshot(spec.out)
    again = run(reusing(spec, last_night), engine_factory=never)
    assert (again.generated, again.reused) == (0, 0)
    assert snapshot(spec.out) == before


def never(plan: Plan, device: str) -> FakeEngine:
    raise AssertionError("a model was loaded")


def test_reuse_is_no_part_of_the_plan(spec: JobSpec, last_night: str, undisturbed: Dataset, tmp_path: Path) -> None:
    """Begun with it, gone on with after the other output has disappeared, and finished without it."""
    halves = replace(spec, runtime=replace(spec.runtime, shard="1/3"))
    first = run(reusing(halves, last_night))
    assert first.reused > 0
    shutil.move(last_night, tmp_path / "moved")
    second = run(reusing(replace(spec, runtime=replace(spec.runtime, shard="2/3")), last_night))
    assert (second.reused, noted(second, f"nothing is taken from {last_night}: ")) == (0, True)
    assert run(spec).exit_code == 1
    assert_same(spec.out, undisturbed, first.reused)


def test_a_place_without_an_output_is_refused_before_anything_is_written(spec: JobSpec, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reuse .*/nowhere: .* has no plan"):
        run(reusing(spec, tmp_path / "nowhere"))
    assert not Path(spec.out).exists()


@pytest.mark.parametrize("name", ["itself", "slash", "dots"])
def test_an_output_does_not_reuse_itself(name: str, tiny_model: Path, prompts: Path, tmp_path: Path) -> None:
    place = {"itself": "out", "slash": "out/", "dots": "x/../out"}[name]
    with pytest.raises(UsageError, match="is this job's own out"):
        job_spec(tiny_model, prompts, tmp_path / "out", reuse=[f"{tmp_path}/{place}"])


def test_the_pointer_of_dated_outputs_leads_to_the_newest(
    spec: JobSpec, last_night: str, undisturbed: Dataset, tmp_path: Path
) -> None:
    pointer = tmp_path / "latest.json"
    pointer.write_text(json.dumps({"format": 1, "out": last_night}))
    assert run(reusing(spec, pointer)).reused == HELD
    assert_same(spec.out, undisturbed, HELD)
    pointer.write_text(json.dumps({"format": 1, "out": spec.out}))
    finished = run(reusing(spec, pointer))
    assert (finished.reused, noted(finished, "it leads to this output itself")) == (0, True)
    pointer.write_text("[]")
    with pytest.raises(UsageError, match="is no pointer to an output"):
        run(reusing(replace(spec, out=str(tmp_path / "new")), pointer))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"nsfw_threshold": 0.7}, "nsfw_threshold: 0.8 there, 0.7 here"),
        ({"on_flagged": "keep"}, "on_flagged: 'blank' there"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 here"),
        ({"threads_per_actor": 2}, "threads_per_actor: 1 there, 2 here"),
        ({"prompt_syntax": "a1111"}, "prompt_syntax"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_can_change_a_picture_keeps_cells_apart(
    changed: dict[str, Any], reason: str, spec: JobSpec, last_night: str
) -> None:
    other = reusing(replace(spec, **changed), last_night)
    summary = run(other)
    assert (summary.reused, summary.generated) == (0, 45)
    assert noted(summary, reason)


def test_another_model_keeps_cells_apart(spec: JobSpec, last_night: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = tmp_path / "model/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("0.00085", "0.00086"))
    summary = run(reusing(replace(spec, model=str(tmp_path / "model")), last_night))
    assert (summary.reused, noted(summary, "model: ")) == (0, True)


def elsewhere(plan: Plan, device: str) -> FakeEngine:
    return FakeEngine(batch_size=plan.batch_size, execution_class="another")


def test_another_execution_class_keeps_cells_apart(spec: JobSpec, last_night: str) -> None:
    summary = run(reusing(spec, last_night), engine_factory=elsewhere)
    assert (summary.reused, summary.generated) == (0, 45)
    assert noted(summary, "cells of another execution class, which are drawn anew: fake there, another here")


def test_another_order_of_rows_and_other_chunks_do_not_matter(
    spec: JobSpec, last_night: str, manifest: Manifest, tmp_path: Path
) -> None:
    turned = replace(spec, prompts=(str(manifest(PROMPTS[::-1], "turned.txt")),), chunk_size=5)
    alone = replace(turned, out=str(tmp_path / "alone"))
    run(alone)
    assert run(reusing(turned, last_night)).reused == HELD
    assert_same(turned.out, read_dataset(alone.out), HELD)


def test_several_outputs_are_asked_in_order_and_a_chain_names_the_nearest(
    spec: JobSpec, last_night: str, undisturbed: Dataset, tmp_path: Path
) -> None:
    third = replace(spec, out=str(tmp_path / "third"), sweep={"guidance_scale": [9], "seed": [0]})
    run(third)
    summary = run(reusing(spec, last_night, third.out))
    assert summary.reused == HELD + 4
    assert_same(spec.out, undisturbed, HELD + 4)
    chained = replace(spec, out=str(tmp_path / "chained"))
    assert run(reusing(chained, spec.out)).generated == POISON
    assert_same(chained.out, undisturbed, 45 - POISON)
    named = read_dataset(chained.out).rows.column("reused_from").drop_null().to_pylist()
    assert all(source.startswith(f"{spec.out}/images/") for source in named)


def test_a_running_job_can_be_taken_from_too(spec: JobSpec, undisturbed: Dataset, tmp_path: Path) -> None:
    half = replace(spec, out=str(tmp_path / "half"), runtime=replace(spec.runtime, shard="1/2"))
    run(half)
    summary = run(reusing(spec, half.out))
    assert 0 < summary.reused < 45 - POISON
    assert_same(spec.out, undisturbed, summary.reused)


def test_damaged_pictures_are_drawn_anew_and_told(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    held = [row for row in read_dataset(last_night).rows.to_pylist() if row["guidance_scale"] == 5 and row["image"]]
    lost, altered, swapped = (Path(last_night, _place(last_night, row["sample_id"])) for row in held[:3])
    lost.unlink()
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    swapped.write_bytes(Path(last_night, _place(last_night, held[3]["sample_id"])).read_bytes())
    summary = run(reusing(spec, last_night))
    assert summary.reused == HELD - 3
    assert noted(summary, f"{lost.relative_to(last_night)} of {last_night} is drawn anew: it is missing")
    assert sum("is drawn anew: " in note for note in summary.notes) == 3
    assert_same(spec.out, undisturbed, HELD - 3)


def test_a_damaged_record_costs_its_chunk_alone(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    record = Path(last_night, record_path(0))
    record.write_bytes(record.read_bytes()[:-9])
    summary = run(reusing(spec, last_night))
    assert HELD - 7 <= summary.reused < HELD
    assert noted(summary, f"1 records of {last_night} cannot be read")
    assert_same(spec.out, undisturbed, summary.reused)


def test_many_damaged_pictures_are_not_told_one_by_one(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    shutil.rmtree(Path(last_night, "images"))
    summary = run(reusing(spec, last_night))
    assert (summary.reused, len(summary.notes)) == (0, 21)
    assert_same(spec.out, undisturbed, 0)


def forged(out: str, chunk: int, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """A commit record of a stranger, who can seal as well as anybody."""
    job = open_job(out)
    record = job.ledger.read(chunk)
    assert record is not None
    data = encode_record(
        [{**row, **change(row)} for row in record.table.to_pylist()],
        job.ledger.schema,
        chunk=chunk,
        attempt=record.attempt,
        plan_hash=record.plan_hash,
        execution_class=record.execution_class,
        versions={},
    )
    Path(out, record_path(chunk)).write_bytes(data)


FORGERIES: tuple[Mapping[str, Any], ...] = (
    {"image": "../secret.png"},
    {"image": "/etc/passwd"},
    {"image": "_job/plan.json"},
    {"bytes": None},
    {"bytes": 1},
    {"sha256": None},
    {"pixel_sha256": "0" * 64},
    {"status": "good"},
    {"status": "failed"},
    {"nsfw_checker": None, "status": "ok"},
)


def test_a_hostile_output_gives_nothing_and_breaks_nothing(
    spec: JobSpec, last_night: str, undisturbed: Dataset
) -> None:
    secret = next(Path(last_night).glob("images/*/*/*.png"))
    shutil.copy(secret, Path(last_night).parent / "secret.png")
    turns = itertools.cycle(FORGERIES)
    for chunk in range(open_job(last_night).plan.n_chunks):
        forged(last_night, chunk, lambda row: next(turns) if row["image"] else {})
    summary = run(reusing(spec, last_night))
    assert (summary.reused, summary.exit_code) == (0, 1)
    assert_same(spec.out, undisturbed, 0)


def test_a_link_in_the_other_output_is_not_followed(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    for picture in Path(last_night).glob("images/*/*/*.png"):
        moved = picture.rename(Path(last_night).parent / f"{picture.stem}-moved.png")
        picture.symlink_to(moved)
    assert run(reusing(spec, last_night)).reused == 0
    assert_same(spec.out, undisturbed, 0)


def linking(spec: JobSpec, *donors: str) -> JobSpec:
    return replace(spec, runtime=replace(spec.runtime, reuse=donors, reuse_by="link"))


def test_links_take_no_space_and_outlive_the_other_output(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    assert run(linking(spec, last_night)).reused == HELD
    for row in read_dataset(spec.out).rows.to_pylist():
        if row["reused_from"] is not None:
            assert Path(spec.out, _place(spec.out, row["sample_id"])).samefile(row["reused_from"])
    shutil.rmtree(last_night)
    assert_same(spec.out, undisturbed, HELD)


def test_links_are_refused_where_they_cannot_be(tiny_model: Path, prompts: Path, spec: JobSpec) -> None:
    donor = job_spec(tiny_model, prompts, "memory://links/last", sweep=NIGHT)
    run(donor)
    with pytest.raises(UsageError, match="another disk than out, or in a bucket; say --reuse-by copy"):
        run(linking(spec, donor.out))
    assert not Path(spec.out).exists()
    assert run(reusing(spec, donor.out)).reused == HELD


@dataclass
class Counting(FakeEngine):
    """Notes how many requests each call has."""

    def sample(self, requests: Any) -> list[Any]:
        print(f"batch {len(requests)}")
        return super().sample(requests)


def counting(plan: Plan, device: str) -> FakeEngine:
    return Counting(batch_size=plan.batch_size)


def test_the_other_output_is_read_once_and_not_once_for_each_cell(
    spec: JobSpec, last_night: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, str]] = []
    for verb in ("read", "list"):
        plain = getattr(Storage, verb)

        def traced(self: Storage, path: str, *rest: Any, plain: Any = plain, verb: str = verb) -> Any:
            if self.url == last_night:
                calls.append((verb, path))
            return plain(self, path, *rest)

        monkeypatch.setattr(Storage, verb, traced)
    run(reusing(spec, last_night), engine_factory=counting)
    n_chunks = open_job(last_night).plan.n_chunks
    records = [path for verb, path in calls if verb == "read" and path.startswith("ledger/")]
    assert len(records) == len(set(records)) == n_chunks
    assert len([path for _, path in calls if path.startswith("images/")]) == HELD
    assert len([path for _, path in calls if path.startswith(("_job/manifest", "dataset"))]) == 0
    drawn = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("batch")]
    assert sum(drawn) == 45 - HELD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "resume"),
    [
        (KillAt("before", "read", "images/", 5), "with"),
        (KillAt("after", "write", "images/", 3), "without"),
        (KillAt("before", "create", "ledger/00000/00000001"), "without"),
        (KillAt("after", "create", "ledger/00000/00000002"), "with"),
        (KillAt("before", "write", "_job/dataset"), "without"),
    ],
    ids=lambda value: f"{value.when} {value.verb} {value.prefix}" if isinstance(value, KillAt) else str(value),
)
def test_a_killed_run_goes_on_with_or_without_it(
    kill_at: KillAt, resume: str, spec: JobSpec, last_night: str, undisturbed: Dataset, tmp_path: Path
) -> None:
    driver = start(reusing(spec, last_night), tmp_path / "log", kill_at=kill_at)
    driver.join(60)
    assert driver.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert run(reusing(spec, last_night) if resume == "with" else spec).exit_code == 1
    taken = read_dataset(spec.out).rows.column("reused_from")
    assert_same(spec.out, undisturbed, HELD if resume == "with" else len(taken) - taken.null_count)
    clean(spec.out, grace_seconds=0)
    assert_same(spec.out, undisturbed, len(taken) - taken.null_count)


@pytest.mark.slow
def test_two_drivers_one_with_and_one_without(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    with ThreadPoolExecutor(2) as pool:
        drivers = [pool.submit(run, one) for one in (reusing(spec, last_night), spec)]
        assert [driver.result().exit_code for driver in drivers] == [1, 1]
    taken = read_dataset(spec.out).rows.column("reused_from")
    assert_same(spec.out, undisturbed, len(taken) - taken.null_count)


def test_taken_pictures_are_healed_as_all_others_are(spec: JobSpec, last_night: str, undisturbed: Dataset) -> None:
    run(reusing(spec, last_night))
    shutil.rmtree(last_night)
    for picture in Path(spec.out).glob("images/*/*/*.png"):
        picture.unlink()
    assert repair(spec.out, engine_factory=fake_engine).exit_code == 0
    assert_same(spec.out, undisturbed, HELD)


def test_plan_counts_what_is_held_already_and_writes_nothing(spec: JobSpec, last_night: str) -> None:
    with draft_plan(reusing(spec, last_night)) as draft:
        seen = preview_reuse(draft)
    assert seen is not None
    assert (seen.total, seen.held, seen.looked_at, seen.samples) == (HELD, {last_night: HELD}, 45, 45)
    assert seen.execution_classes == ("fake",)
    by_value = {(axis.axis, axis.value): (axis.held, axis.samples) for axis in seen.axes}
    assert by_value["guidance_scale", "9.0"] == (0, 15)
    assert by_value["guidance_scale", "3.0"] == (12, 15)
    assert by_value["seed", "1"] == (8, 15)
    assert not Path(spec.out).exists()
    with draft_plan(spec) as draft:
        assert preview_reuse(draft) is None
    with draft_plan(reusing(replace(spec, on_flagged="keep"), last_night)) as draft:
        apart = preview_reuse(draft)
    assert apart is not None
    assert (apart.total, "on_flagged" in apart.notes[0]) == (0, True)


def seeded_by_place(spec: JobSpec, out: str, guidance: list[float], **changed: Any) -> JobSpec:
    return replace(spec, out=f"{spec.out}-{out}", sweep={"guidance_scale": guidance}, **changed)


def previewed(spec: JobSpec) -> Any:
    with draft_plan(spec) as draft:
        return preview_reuse(draft)


def test_plan_says_so_where_little_is_held_because_seeds_follow_places(
    spec: JobSpec, tiny_model: Path, tmp_path: Path
) -> None:
    last = seeded_by_place(spec, "last", [3, 5])
    run(last)
    changed = previewed(reusing(seeded_by_place(spec, "changed", [3, 7]), last.out))
    assert (changed.total, changed.samples, changed.notes) == (4, 10, ())  # where the grid keeps its size, so do seeds
    wider = previewed(reusing(seeded_by_place(spec, "wider", [3, 5, 7]), last.out))
    assert wider.total < 4
    (note,) = wider.notes
    assert "no axis and no column names the seeds" in note
    assert previewed(reusing(seeded_by_place(spec, "elsewhere", [3, 5, 7], on_flagged="keep"), last.out)).total == 0
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "seed": 9}\n')
    named = replace(seeded_by_place(spec, "named", [3, 5, 7]), prompts=(str(tmp_path / "rows.jsonl"),))
    assert previewed(reusing(named, last.out)).notes == ()


@pytest.mark.parametrize(
    ("example", "wider"),
    [
        ("seed-cfg-grid", "guidance_scale=1,2,4,7.5,9"),
        ("nightly-sweep", "num_inference_steps=10,20,30"),
    ],
)
def test_an_example_that_gets_one_value_more_draws_that_one_alone(
    example: str, wider: str, prompts: Path, tmp_path: Path
) -> None:
    """As the examples say."""
    job = str(Path(__file__).parents[2] / f"configs/jobs/{example}.yaml")
    flags = {"prompts": [str(prompts)], "executor": "inline", "watermark": "none", "width": 64, "height": 64}
    last = resolve(job, {**flags, "out": str(tmp_path / "last")})
    run(last)
    held = read_dataset(last.out).rows.column("image").drop_null()
    old = resolve(job, {**flags, "out": str(tmp_path / "again"), "reuse": [last.out]})
    assert previewed(old).total == len(held)
    more = previewed(resolve(job, {**flags, "out": str(tmp_path / "wider"), "reuse": [last.out], "sweep": [wider]}))
    assert (more.total, more.notes) == (len(held), ())
    new = [axis for axis in more.axes if axis.value in {"9.0", "30"}]
    assert [axis.held for axis in new] == [0]


def test_images_count_by_their_digests_and_with_their_strength(tiny_model: Path, tmp_path: Path) -> None:
    def job(name: str, rows: list[dict[str, Any]], **settings: Any) -> JobSpec:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": "one", "seed": 1, **row}) + "\n" for row in rows))
        return job_spec(tiny_model, path, tmp_path / name, chunk_size=6, **settings)

    for name, colour in {"a": "red", "copy": "red", "b": "blue", "mask": "white", "other": "grey"}.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    image, masked = {"image": "a.png", "strength": 0.5}, {"image": "a.png", "mask": "mask.png"}
    last, plain = job("last", [image, {}, masked]), job("plain", [{}])
    for spec in (last, plain):
        assert run(spec).exit_code == 0
    same = [image | {"image": "copy.png"}, {}, masked]
    new = [image | {"strength": 0.6}, image | {"image": "b.png"}, masked | {"mask": "other.png"}]
    for donor, reused in ((last, 3), (plain, 1)):
        summary = run(job(f"tonight-{reused}", [*same, *new], reuse=[donor.out]))
        assert (summary.exit_code, summary.reused, summary.generated) == (0, reused, 6 - reused)
    assert run(job("prompts", [{}], reuse=[last.out])).reused == 1


@pytest.mark.slow
def test_the_real_engine_agrees(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Mixed loops in one chunk, and what is new drawn in other batches than an undisturbed run has."""
    mixed = {"sampler": ["ddim", "euler_a"], "num_inference_steps": [2, 3]}
    settings: dict[str, Any] = {"chunk_size": 12, "batch_size": 3, "safety": "none"}
    spec = job_spec(tiny_model, manifest(3), tmp_path / "last", sweep={**mixed, "seed": [1, 2]}, **settings)
    run(spec, engine_factory=load_engine)
    tonight = replace(spec, out=str(tmp_path / "tonight"), sweep={**mixed, "seed": [1, 3]})
    alone = replace(tonight, out=str(tmp_path / "alone"))
    run(alone, engine_factory=load_engine)
    summary = run(reusing(tonight, spec.out), engine_factory=load_engine)
    assert (summary.exit_code, summary.reused, summary.generated) == (0, 12, 12)
    assert_same(tonight.out, read_dataset(alone.out), 12)
