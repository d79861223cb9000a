"""One chunk: policies, rows, pictures, and the record that is written last."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentmill.engine import GenerationRequest
from latentmill.jobs import postprocess, worker
from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.ledger import record_path
from latentmill.jobs.ledger.pictures import decode_png, encode_png, pixel_sha256
from latentmill.jobs.manifests.parameters import TEXT_LIMIT, parameters_text
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import ChunkGenerator, GeneratedChunk, postprocess_chunk
from tests.jobs.driver import job_spec
from tests.jobs.fakes import fake_engine, fake_pixels

Manifest = Callable[..., Path]
MIXED = ["a red circle", "some nsfw", "some poison", "a blue square"]


@pytest.fixture
def start_job(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> Callable[..., str]:
    """Adopts a plan of one chunk and returns the output."""

    def adopt_plan(prompts: list[str] | Path = MIXED, **settings: Any) -> str:
        out = str(tmp_path / "out")
        settings = {"chunk_size": 16, "batch_size": 4} | settings
        path = prompts if isinstance(prompts, Path) else manifest(prompts)
        with draft_plan(job_spec(tiny_model, path, out, **settings)) as draft:
            adopt(draft, Storage.open(out))
        return out

    return adopt_plan


def generate(out: str, chunk: int = 0) -> GeneratedChunk:
    generated = ChunkGenerator(open_job(out), engine_factory=fake_engine).generate(chunk)
    assert isinstance(generated, GeneratedChunk)
    return generated


def rows_of(job: Job, chunk: int = 0) -> list[dict[str, Any]]:
    record = job.ledger.read(chunk)
    assert record is not None
    return record.table.to_pylist()


@pytest.mark.parametrize("policy", ["blank", "drop", "keep"])
def test_flagged_pictures_follow_the_policy_and_stay_flagged(policy: str, start_job: Callable[..., str]) -> None:
    out = start_job(on_flagged=policy)
    result = postprocess_chunk(open_job(out), generate(out))
    assert (result.outcome, result.ok, result.flagged, result.failed) == ("committed", 2, 1, 1)
    job = open_job(out)
    rows = rows_of(job)
    assert [row["status"] for row in rows] == ["ok", "flagged", "failed", "ok"]
    flagged, failed = rows[1], rows[2]
    assert flagged["nsfw_score"] == pytest.approx(0.9)
    assert failed["error"] == "this prompt is poison"
    assert {failed[name] for name in ("image", "bytes", "sha256", "pixel_sha256", "nsfw_score")} == {None}
    request = job.plan.samples_of_chunk(0)[1].request
    if policy == "drop":
        assert {flagged[name] for name in ("image", "bytes", "sha256", "pixel_sha256", "watermark")} == {None}
    else:
        expected = np.zeros((64, 64, 3), np.uint8) if policy == "blank" else fake_pixels(request)
        assert np.array_equal(decode_png(job.pictures.read(flagged["image"])), expected)
    written = {path for path, _ in job.storage.list("images")}
    assert written == {row["image"] for row in rows if row["image"] is not None}


def test_rows_say_what_was_asked_and_what_was_made(start_job: Callable[..., str], tmp_path: Path) -> None:
    lines = [{"prompt": 'snow, "quoted"\nnext line', "id": "x/../y", "topic": "winter", "status": "mine"}]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = start_job(manifest)
    postprocess_chunk(open_job(out), generate(out))
    job = open_job(out)
    (row,) = rows_of(job)
    sample = job.plan.samples_of_chunk(0)[0]
    assert row["prompt"] == lines[0]["prompt"]
    assert (row["row_id"], row["topic"], row["manifest_status"]) == ("x/../y", "winter", "mine")
    assert (row["seed"], row["width"], row["sampler"]) == (sample.request.seed, 64, "ddim")
    assert row["image"].startswith("images/00000/00000000-")
    assert row["image"].endswith(f"/{sample.sample_id}.png")
    assert row["pixel_sha256"] == pixel_sha256(fake_pixels(sample.request))
    assert (row["batch_size"], row["batch_slot"], row["execution_class"]) == (4, 0, "fake")
    with Image.open(io.BytesIO(job.pictures.read(row["image"]))) as image:
        assert image.text["parameters"].startswith(lines[0]["prompt"] + "\nSteps: 2, Sampler: DDIM, CFG scale: ")


def test_the_mark_is_read_back_from_the_saved_pixels(start_job: Callable[..., str]) -> None:
    from latentmill.engine import watermark_bit_accuracy

    out = start_job(["one", "two nsfw"], width=256, height=256, watermark="dwtDctSvd")
    postprocess_chunk(open_job(out), generate(out))
    job = open_job(out)
    for row in rows_of(job):
        pixels = decode_png(job.pictures.read(row["image"]))
        assert row["watermark"] == "dwtDctSvd"
        assert row["watermark_bit_accuracy"] == pytest.approx(
            watermark_bit_accuracy(pixels, job.plan.settings.watermark_text, "dwtDctSvd")
        )
        assert row["pixel_sha256"] == pixel_sha256(pixels)


def test_a_sample_that_cannot_be_finished_fails_alone(
    start_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = start_job(["one", "two", "three"])
    calls = []

    def encode(pixels: np.ndarray, text: str) -> bytes:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("encoder error -2")
        return encode_png(pixels, text)

    monkeypatch.setattr(postprocess, "encode_png", encode)
    result = postprocess_chunk(open_job(out), generate(out))
    assert (result.ok, result.failed) == (2, 1)
    assert rows_of(open_job(out))[1]["error"] == "the picture could not be finished: OSError: encoder error -2"


def test_no_verdict_is_never_ok(start_job: Callable[..., str]) -> None:
    out = start_job(["one", "two"])
    generated = generate(out)
    results = [replace(result, safety=None) for result in generated.results]
    result = postprocess_chunk(open_job(out), replace(generated, results=results))
    assert (result.ok, result.failed) == (0, 2)
    rows = rows_of(open_job(out))
    assert [row["image"] for row in rows] == [None, None]
    assert all("no safety verdict" in row["error"] for row in rows)


def test_two_attempts_at_one_chunk_have_one_winner(start_job: Callable[..., str]) -> None:
    out = start_job()
    generated = generate(out)
    first, second = postprocess_chunk(open_job(out), generated), postprocess_chunk(open_job(out), generated)
    assert (first.outcome, second.outcome) == ("committed", "lost")
    job = open_job(out)
    record = job.ledger.read(0)
    assert record is not None
    assert {row["image"].split("/")[2] for row in rows_of(job) if row["image"]} == {f"00000000-{record.attempt}"}
    assert len({path.split("/")[2] for path, _ in job.storage.list("images")}) == 2
    again = ChunkGenerator(open_job(out), engine_factory=fake_engine).generate(0)
    assert isinstance(again, ChunkResult)
    assert (again.outcome, again.ok, again.flagged, again.failed) == ("already", 2, 1, 1)


def test_nothing_is_committed_when_a_picture_cannot_be_stored(
    start_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = start_job()
    generated = generate(out)
    job = open_job(out)
    write = job.storage._backend.write

    def full(path: str, data: bytes) -> None:
        if path.endswith("3.png"):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(job.storage._backend, "write", full)
    with pytest.raises(StorageError, match="free some space"):
        postprocess_chunk(job, generated)
    assert job.ledger.read(0) is None


@pytest.mark.parametrize("pixels", [(64, 64), (17, 5)])
def test_pngs_are_deterministic_and_lossless(pixels: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*pixels, 3), dtype=np.uint8)
    data = encode_png(picture, "a 漢字 prompt")
    assert data == encode_png(picture.copy(), "a 漢字 prompt")
    assert np.array_equal(decode_png(data), picture)
    with pytest.raises(ValueError, match="not readable as a PNG"):
        decode_png(data[: len(data) // 2])


@pytest.mark.parametrize("prompt", ["plain", "snow ☃ 漢字", "a" * 50_000, "☃" * 20_000, 'key: value, "x"\nSteps: 1'])
def test_parameters_text_is_read_back_whole_by_pillow(prompt: str) -> None:
    request = GenerationRequest(
        prompt=prompt, negative_prompt=prompt, seed=7, width=64, height=32, num_inference_steps=20, guidance_scale=4.5
    )
    text = parameters_text(request, model_name="my, model", model_hash="abc", version="latentmill 1")
    assert len(text.encode()) <= TEXT_LIMIT
    last = text.rpartition("\n")[2]
    assert last == (
        "Steps: 20, Sampler: DDIM, CFG scale: 4.5, Seed: 7, Size: 64x32, Model hash: abc, "
        'Model: "my, model", Version: latentmill 1'
    )
    with Image.open(io.BytesIO(encode_png(np.zeros((8, 8, 3), np.uint8), text))) as image:
        image.load()
        assert image.text["parameters"] == text


def test_text_that_png_cannot_hold_is_replaced() -> None:
    request = GenerationRequest(prompt="a\0b\ud800c", width=64, height=64)
    text = parameters_text(request, model_name="m", model_hash="h", version="v")
    assert text.startswith("a\ufffdb\ufffdc\nSteps: 50")


def test_an_upgrade_half_way_changes_no_byte(start_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = start_job()
    generated = generate(out)
    postprocess_chunk(open_job(out), generated)
    job = open_job(out)
    before = {row["sample_id"]: row["sha256"] for row in rows_of(job)}
    job.storage.delete(record_path(0))
    monkeypatch.setattr(worker, "_versions", lambda: {"latentmill": "99", "python": "4"})
    postprocess_chunk(open_job(out), generated)
    record = job.ledger.read(0)
    assert record is not None
    assert record.metadata["version.latentmill"] == "99"
    assert {row["sample_id"]: row["sha256"] for row in rows_of(job)} == before


@pytest.fixture(scope="module")
def many_loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prompts in no order of steps and samplers, one of which cannot be drawn."""
    path = tmp_path_factory.mktemp("loops") / "rows.jsonl"
    loops = [("ddim", 4), ("heun", 2), ("plms", 3), ("ddim", 2), ("euler_a", 4)] * 2
    rows = [
        {"prompt": f"number {n}" + " poison" * (n == 6), "sampler": sampler, "num_inference_steps": steps}
        for n, (sampler, steps) in enumerate(loops)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_chunk_of_many_loops_is_made_again_row_by_row_with_the_same_bits_and_slots(
    start_job: Callable[..., str], many_loops: Path
) -> None:
    """By the real engine: whole, each row alone as after a crash, and each in its slot as for a repair."""
    out = start_job(many_loops, sampler=None, num_inference_steps=None, safety="none")
    job = open_job(out)
    assert job.plan.n_chunks == 1
    generator = ChunkGenerator(job)
    whole = generator.generate(0)
    assert isinstance(whole, GeneratedChunk)
    steps = [sample.request.num_inference_steps for sample in job.plan.samples_of_chunk(0)]
    assert steps == sorted(steps)
    slots = {row: result.batch_slot for row, result in enumerate(whole.results)}
    assert slots != {row: row % 4 for row in slots}, "nothing was put into another order"
    for row, result in enumerate(whole.results):
        alone = generator.process_row(0, row)
        expected = postprocess.postprocess_sample(
            job.plan, job.plan.samples_of_chunk(0)[row], result, whole.execution_class
        )
        assert alone.data == expected.data
        assert alone.row == expected.row
    for row, results in generator.generate_in_slots(0, slots):
        first = next(results)
        assert np.array_equal(first.pixels, whole.results[row].pixels)
        assert first.batch_slot == slots[row]


def test_a_repair_touches_no_other_row(start_job: Callable[..., str], many_loops: Path) -> None:
    out = start_job(many_loops, sampler=None, num_inference_steps=None)
    postprocess_chunk(open_job(out), generate(out))
    rows = rows_of(open_job(out))
    (failed,) = [place for place, row in enumerate(rows) if row["status"] == "failed"]
    asked: list[str] = []
    generator = ChunkGenerator(open_job(out), engine_factory=fake_engine)
    sample = generator._engine.sample
    generator._engine.sample = lambda batch: (asked.extend(row.prompt for row in batch), sample(batch))[1]  # type: ignore[method-assign]
    again = generator.generate(0, repair=True)
    assert isinstance(again, GeneratedChunk)
    assert (list(again.rows), set(asked)) == ([failed], {"number 6 poison"})
    assert again.results[0].batch_slot == rows[failed]["batch_slot"]
