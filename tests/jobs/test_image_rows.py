"""Rows that start from an image: pinned by its digest when planned, and rejected with the reason if hostile."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from diffusers import AutoencoderTiny
from PIL import Image

from latentmill.engine import EngineError
from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.manifests.images import MAX_FILE_BYTES, PlannedImage, decode, fit
from latentmill.jobs.outputs.publish import load_publication, read_columns
from latentmill.jobs.outputs.redraw import Drawing
from latentmill.jobs.outputs.regenerate import regenerate
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import draft_plan
from latentmill.jobs.recipe import recipe_of
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.worker import load_engine
from tests.jobs.driver import job_spec, run

Rows = list[dict[str, Any]]


def noise(width: int = 96, height: int = 64, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(picture: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def png(seed: int = 0, width: int = 96, height: int = 64) -> bytes:
    return encoded(Image.fromarray(noise(width, height, seed=seed)))


def animated(format_: str) -> bytes:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("black", "red")]
    return encoded(frames[0], format_, save_all=True, append_images=frames[1:])


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes whose header promises that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of these rows."""

    def write(rows: Rows, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": "a cat", **row}) + "\n" for row in rows))
        return path

    return write


def published(spec: JobSpec) -> Rows:
    job = open_job(spec.out)
    publication = load_publication(job)
    assert publication is not None
    return [
        row
        for part in publication.parts
        for row in read_columns(job, part, [name for name, _ in publication.schema]).to_pylist()
    ]


def rejects(spec: JobSpec) -> dict[int, str]:
    with draft_plan(spec) as draft:
        return {reject.row_number: reject.reason for _, reject in draft.rejects.first}


def test_rows_with_and_without_an_image_are_drawn_in_one_job(tiny_model, write, tmp_path):
    """By the model itself; each row says what it started from, and is made again from nothing but that."""
    (tmp_path / "in").mkdir()
    first, second = png(1), png(2, 64, 64)
    (tmp_path / "in/a.png").write_bytes(first)
    (tmp_path / "b.png").write_bytes(second)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    (tmp_path / "mask.png").write_bytes(encoded(Image.fromarray(mask)))
    rows = write(
        [
            {"image": "in/a.png", "strength": 0.5},
            {},
            {"image": str(tmp_path / "b.png"), "mask": "mask.png", "num_inference_steps": 5},
        ]
    )
    spec = job_spec(tiny_model, rows, tmp_path / "out", chunk_size=4, num_inference_steps=4, safety="none")
    summary = run(spec, engine_factory=load_engine)
    assert (summary.exit_code, summary.failures) == (0, ())
    one, two, three = published(spec)
    expected = {
        "init_image": str(tmp_path / "in/a.png"),
        "init_image_sha256": hashlib.sha256(first).hexdigest(),
        "strength": 0.5,
        "mask": None,
        "mask_sha256": None,
    }
    assert {name: one[name] for name in expected} == expected
    assert all(two[name] is None for name in expected)
    assert three["init_image_sha256"] == hashlib.sha256(second).hexdigest()
    assert (three["mask"], round(three["strength"], 6)) == (str(tmp_path / "mask.png"), 0.8)
    assert verify(spec.out).defects == ()
    for row in (one, two, three):
        recipe = recipe_of(row)
        pixels = recipe.draw(recipe.load("cpu"))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == row["pixel_sha256"]


@pytest.mark.long
def test_rows_start_from_images_with_each_model_and_are_made_again_together(tiny_model, write, tmp_path):
    """Each model encodes by its own autoencoder: what it draws is what it draws in a job of its own."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.25}))
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = write([{"image": "0.png", "seed": 1}, {"seed": 1}, {"image": "1.png", "mask": "0.png", "seed": 1}])
    settings: dict[str, Any] = {"safety": "none", "chunk_size": 8, "batch_size": 3, "num_inference_steps": 4}
    both = job_spec(tiny_model, rows, tmp_path / "both", sweep={"model": [str(tiny_model), str(other)]}, **settings)
    found = []
    for spec in (both, *(job_spec(model, rows, tmp_path / model.name, **settings) for model in (tiny_model, other))):
        assert run(spec, engine_factory=load_engine).exit_code == 0
        found.append({(row["model_sha256"], row["init_image"], row["pixel_sha256"]) for row in published(spec)})
    assert found[0] == found[1] | found[2]
    assert len(found[0]) == 6
    again = regenerate(both.out, list(range(6)), drawing=Drawing(device="cpu"))
    assert {sample.outcome for sample in again.samples} == {"identical"}


def test_a_decoder_for_previews_encodes_no_image_and_is_refused_before_the_job(tiny_model, write, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    config = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    config.save_pretrained(tmp_path / "tiny")
    spec = job_spec(tiny_model, write([{"image": "a.png"}]), tmp_path / "out", preview_decoder=str(tmp_path / "tiny"))
    with pytest.raises(UsageError, match=r"previews.*; here it draws from prompts alone; drop the column image"):
        draft_plan(spec)


@pytest.mark.long
def test_a_file_that_changed_since_is_noticed_and_a_missing_one_fails_its_row_alone(tiny_model, write, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    spec = job_spec(tiny_model, write([{"image": f"{number}.png"} for number in range(3)]), tmp_path / "out")

    def losing(plan: Any, device: str) -> Any:
        (tmp_path / "1.png").unlink()
        return load_engine(plan, device)

    summary = run(spec, engine_factory=losing)
    assert summary.exit_code == 1
    assert [row["status"] for row in published(spec)] == ["ok", "failed", "ok"]
    assert "1.png does not exist" in published(spec)[1]["error"]
    (tmp_path / "1.png").write_bytes(png(1))
    assert run(spec, engine_factory=load_engine).generated == 0
    again = job_spec(tiny_model, spec.prompts[0], spec.out, retry_failed=True)
    assert run(again, engine_factory=load_engine).exit_code == 0
    assert [row["status"] for row in published(spec)] == ["ok"] * 3
    (tmp_path / "0.png").write_bytes(png(7))
    with pytest.raises(OutputConflictError, match="manifest rows"):
        run(spec)


def test_strength_is_an_axis_a_flag_and_a_column(tiny_model, write, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    plain = write([{"image": "a.png"}, {"image": "a.png", "strength": 1}])
    by_flag = job_spec(tiny_model, plain, tmp_path / "flag", strength=0.5)
    swept = job_spec(
        tiny_model, write([{"image": "a.png"}], "one.jsonl"), tmp_path / "axis", sweep={"strength": "0.5,1"}
    )
    for spec, expected in ((by_flag, [0.5, 1.0]), (swept, [0.5, 1.0])):
        assert run(spec).exit_code == 0
        assert [row["strength"] for row in published(spec)] == expected
    pairs: dict[str, Any] = {"sweep": {"strength": [0.25, 0.5], "num_inference_steps": [4, 2]}}
    with draft_plan(job_spec(tiny_model, plain, tmp_path / "zip", zip=["strength,num_inference_steps"], **pairs)) as it:
        assert (it.n_rows, it.grid.n_samples) == (2, 4)
    with pytest.raises(UsageError, match=r"strength 0.25 of 2 steps is less than one step"):
        draft_plan(job_spec(tiny_model, plain, tmp_path / "product", **pairs))
    with pytest.raises(UsageError, match="has no column 'image'; add one, or leave strength out"):
        draft_plan(job_spec(tiny_model, write([{}], "none.jsonl"), tmp_path / "x", strength=0.5))
    with pytest.raises(UsageError, match="a column 'mask' but no column 'image'"):
        draft_plan(job_spec(tiny_model, write([{"mask": "a.png"}], "mask.jsonl"), tmp_path / "x"))


SIZES: Sequence[tuple[tuple[int, int], Mapping[str, int], tuple[int, int]]] = [
    ((200, 100), {}, (192, 96)),
    ((1024, 512), {}, (352, 160)),
    ((40, 500), {}, (32, 480)),
    ((200, 100), {"width": 64}, (64, 256)),
    ((200, 100), {"width": 64, "height": 128}, (64, 128)),
]


def test_a_row_without_a_size_is_as_large_as_its_image(tiny_model, write, tmp_path):
    """The model's own size is 256x256: so many pixels are not exceeded."""
    for number, (image, _, _) in enumerate(SIZES):
        (tmp_path / f"{number}.png").write_bytes(png(0, *image))
    rows = write([*({"image": f"{number}.png", **given} for number, (_, given, _) in enumerate(SIZES)), {}])
    spec = job_spec(tiny_model, rows, tmp_path / "out", width=None, height=None, num_inference_steps=2)
    assert run(spec).exit_code == 0
    expected = [*(size for _, _, size in SIZES), (256, 256)]
    assert [(row["width"], row["height"]) for row in published(spec)] == expected


def test_plans_without_images_are_what_they_were(tiny_model, manifest, tmp_path):
    with draft_plan(job_spec(tiny_model, manifest(2), tmp_path / "out")) as draft:
        assert "strength" not in draft.identity["parameters"]
        assert draft.document()["manifest"]["own"] == ["prompt"]
    spec = job_spec(tiny_model, manifest(2), tmp_path / "out")
    assert run(spec).exit_code == 0
    assert not {"init_image", "init_image_sha256", "strength", "mask", "mask_sha256"} & published(spec)[0].keys()


HOSTILE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "text.png": (lambda path: path.write_text("no picture"), "is no PNG, JPEG or WebP picture"),
    "empty.png": (lambda path: path.write_bytes(b""), "is no PNG, JPEG or WebP picture"),
    "drawing.svg": (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "is no PNG"),
    "moving.gif": (lambda path: path.write_bytes(encoded(Image.new("P", (64, 64)), "GIF")), "is no PNG, JPEG or WebP"),
    "wide.png": (lambda path: path.write_bytes(bomb(8000, 8000)), "has 8000x8000 pixels, the limit is 33,554,432"),
    "bomb.png": (lambda path: path.write_bytes(bomb(60_000, 60_000)), "pixels, the limit is 33,554,432 in all"),
    "short.png": (lambda path: path.write_bytes(png()[:-4000]), "is damaged or cut off"),
    "short.jpg": (
        lambda path: path.write_bytes(encoded(Image.fromarray(noise()), "JPEG")[:-1500]),
        "is damaged or cut off",
    ),
    "animated.png": (lambda path: path.write_bytes(animated("PNG")), "is animated; give one still picture"),
    "animated.webp": (lambda path: path.write_bytes(animated("WEBP")), "is animated; give one still picture"),
    "pipe.png": (os.mkfifo, "is no regular file"),
    "folder.png": (lambda path: path.mkdir(), "is no regular file"),
    "zero.png": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "huge.png": (lambda path: path.touch() or os.truncate(path, MAX_FILE_BYTES + 1), "has more than 67,108,864 bytes"),
    "missing.png": (lambda _: None, "does not exist; correct it, or leave it out"),
    "loop.png": (lambda path: path.symlink_to(path), "cannot be read"),
}
ADDRESSES = {
    "http://127.0.0.1:9/a.png": "only file, s3, gs, abfs, memory, hf are allowed",
    "simplecache::http://127.0.0.1:9/a.png": "chained or malformed",
    "s3://user:hunter2@bucket/a.png": "carries a user, a password or a query",
    "s3://bucket/a.png?key=hunter2": "carries a user, a password or a query",
    "memory://nowhere/a.png": "does not exist",
}


def test_hostile_files_and_addresses_reject_their_rows_with_the_reason(tiny_model, write, tmp_path):
    for name, (make, _) in HOSTILE.items():
        make(tmp_path / name)
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "mask.png").write_bytes(png(0, 64, 64))
    rows: Rows = [{"image": name} for name in (*HOSTILE, *ADDRESSES)]
    rows += [
        {"image": "good.png", "mask": "mask.png"},
        {"mask": "good.png"},
        {"strength": 0.5},
        {"image": "good.png", "strength": 0.01},
        {"image": "good.png"},
    ]
    reasons = [reason for _, reason in HOSTILE.values()] + [*ADDRESSES.values()]
    reasons += [
        "mask is 64x64, its image 96x64; give both one size",
        "mask is given without an image",
        "strength is given without an image",
        "strength 0.01 of 2 steps is less than one step",
    ]
    spec = job_spec(tiny_model, write(rows), tmp_path / "out")
    with draft_plan(spec) as draft:
        assert draft.rejects.count == len(reasons)
        assert draft.n_rows == 1
    found: dict[int, str] = {}
    for start in range(0, len(reasons), 8):  # a draft keeps the first ten
        part = job_spec(tiny_model, write([*rows[start : start + 8], rows[-1]], "part.jsonl"), tmp_path / "out")
        found |= {start + number - 1: reason for number, reason in rejects(part).items()}
    for place, reason in enumerate(reasons):
        assert reason in found[place], (rows[place], found[place])
        assert "hunter2" not in found[place]


def test_the_kinds_of_pictures_and_what_becomes_of_them():
    """Transparent shows white, 16 bits are cut to 8, EXIF turns, grey is grey in all channels."""
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    assert np.asarray(decode(encoded(Image.fromarray(clear))))[0, [0, 7]].tolist() == [[10, 20, 30], [255, 255, 255]]
    deep = np.full((8, 8), 0x80FF, np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(deep))))[0, 0].tolist() == [0x80] * 3
    grey = np.asarray(decode(encoded(Image.new("L", (8, 8), 77))))
    assert grey.shape == (8, 8, 3)
    assert set(grey.ravel().tolist()) == {77}
    picture = Image.fromarray(noise(96, 64))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned = decode(encoded(picture, "PNG", exif=exif))
    assert turned.size == (64, 96)
    assert np.array_equal(np.asarray(turned), np.rot90(noise(96, 64), -1))
    colours = Image.fromarray(noise(16, 16)).quantize(8)
    assert np.array_equal(np.asarray(decode(encoded(colours))), np.asarray(colours.convert("RGB")))
    assert decode(encoded(Image.new("CMYK", (8, 8)), "JPEG")).mode == "RGB"


def test_a_picture_keeps_its_proportions_and_loses_its_edges():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255
    assert fit(decode(encoded(Image.fromarray(wide))), 32, 32).min() > 200
    same = noise(96, 64)
    assert np.array_equal(fit(decode(encoded(Image.fromarray(same))), 96, 64), same)


@pytest.mark.long
def test_images_are_read_from_object_stores_too(tiny_model, write, tmp_path):
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(png(3))
    spec = job_spec(tiny_model, write([{"image": "memory://pictures/a.png"}]), tmp_path / "out")
    assert run(spec, engine_factory=load_engine).exit_code == 0
    assert published(spec)[0]["init_image"] == "memory://pictures/a.png"


def test_an_image_that_is_read_again_must_be_the_planned_one(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    image = PlannedImage(place=str(tmp_path / "a.png"), sha256=hashlib.sha256(png()).hexdigest())
    assert image.read(32, 32).pixels.shape == (32, 32, 3)
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(EngineError, match="is not the planned file"):
        image.read(64, 32)
