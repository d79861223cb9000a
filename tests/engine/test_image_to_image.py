"""Rows that start from a picture, with and without a mask: as diffusers draws them, whatever is in the batch beside."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from latentmill.engine import (
    EMBEDDED_MODEL,
    SAMPLERS,
    Engine,
    EngineError,
    GenerationRequest,
    ModelSpec,
    SourceImage,
    describe_model,
)
from tests.engine.families import assert_same_pictures, requests, unet, write_ldm, write_sd1, write_sd2, write_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

SIDE = 32
SIZE = (2 * SIDE, SIDE)


def photo(number: int) -> SourceImage:
    """Smooth colours with a shape in them, different for each number."""
    draw = np.random.default_rng(number)
    small = Image.fromarray(draw.integers(0, 256, (4, 8, 3), dtype=np.uint8))
    return SourceImage(pixels=np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC)))


def masked(source: SourceImage) -> SourceImage:
    mask = np.zeros((SIDE, 2 * SIDE), dtype=bool)
    mask[7:25, 9:50] = True
    return replace(source, mask=mask)


def rows_of(strength: float, *, mask: bool = False, **changes: Any) -> list[GenerationRequest]:
    rows = requests(SIDE, **{"steps": 4, **changes})
    pictures = [masked(photo(row.seed)) if mask else photo(row.seed) for row in rows]
    return [replace(row, image=picture, strength=strength) for row, picture in zip(rows, pictures, strict=True)]


def load(model: Path, **spec: str) -> Engine:
    return Engine.load(ModelSpec(model=str(model), safety="none", **spec), device="cpu", dtype="float32", batch_size=4)


def pictures(engine: Engine, rows: list[GenerationRequest]) -> np.ndarray:
    results = engine.generate(rows)
    assert [result.error for result in results] == [None] * len(rows)
    return np.stack([result.pixels for result in results])


def reference(pipeline: Any, rows: list[GenerationRequest]) -> np.ndarray:
    """What diffusers draws for the same requests, from the same pictures and noise."""
    pipeline.set_progress_bar_config(disable=True)
    first, sources = rows[0], [row.image for row in rows]
    extra: dict[str, Any] = {}
    if isinstance(pipeline, StableDiffusionInpaintPipeline):
        masks = [Image.fromarray(source.mask.astype(np.uint8) * 255) for source in sources]
        extra = {"mask_image": masks, "width": first.width, "height": first.height}
    found = pipeline(
        [row.prompt for row in rows],
        image=[Image.fromarray(source.pixels) for source in sources],
        strength=first.strength,
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        output_type="np",
        **extra,
    ).images
    return (found * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def engine(sd1: Path) -> Engine:
    return load(sd1)


WITHOUT_CHECKER: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
SCHEDULERS: dict[str, Any] = {
    "ddim": None,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}


def with_scheduler(pipeline: Any, sampler: str) -> Any:
    kind = SCHEDULERS[sampler]
    if kind is not None:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.mark.parametrize(
    ("sampler", "strength"),
    [
        ("ddim", 0.6),
        *(pytest.param(sampler, 0.6, marks=pytest.mark.long) for sampler in SCHEDULERS if sampler != "ddim"),
        *(pytest.param(sampler, 1.0, marks=pytest.mark.long) for sampler in ("ddim", "euler")),
    ],
)
def test_pictures_from_pictures_equal_the_reference_pipelines(sampler, strength, sd1, engine):
    rows = rows_of(strength, sampler=sampler)
    pipeline = with_scheduler(StableDiffusionImg2ImgPipeline.from_pretrained(sd1, **WITHOUT_CHECKER), sampler)
    assert_same_pictures(pictures(engine, rows), reference(pipeline, rows))


@pytest.mark.long
def test_a_model_that_predicts_velocity_and_a_large_one_start_from_pictures_too(tmp_path):
    second, large = write_sd2(tmp_path / "sd2"), write_sdxl(tmp_path / "sdxl")
    rows = rows_of(0.6)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(second, **WITHOUT_CHECKER)
    assert_same_pictures(pictures(load(second), rows), reference(pipeline, rows))
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(large, add_watermarker=False)
    assert_same_pictures(pictures(load(large), rows), reference(pipeline, rows))


@pytest.mark.parametrize(
    ("sampler", "strength"),
    [
        ("euler", 1.0),
        pytest.param("ddim", 0.6, marks=pytest.mark.long),
        pytest.param("dpmpp_2m", 0.6, marks=pytest.mark.long),
    ],
)
def test_pictures_behind_masks_equal_the_reference_pipelines(sampler, strength, sd1, engine):
    rows = rows_of(strength, mask=True, sampler=sampler)
    pipeline = with_scheduler(StableDiffusionInpaintPipeline.from_pretrained(sd1, **WITHOUT_CHECKER), sampler)
    assert_same_pictures(pictures(engine, rows), reference(pipeline, rows))


@pytest.mark.long
def test_a_rows_bits_do_not_depend_on_what_starts_beside_it(engine):
    """Every sampler from a picture, with others from noise and behind masks, at several strengths, in any order."""
    rows = []
    for number, sampler in enumerate(SAMPLERS):
        plain = replace(requests(SIDE, steps=2, sampler=sampler)[number % 4], seed=number)
        rows += [plain] if number % 3 == 0 else []
        rows.append(replace(plain, image=photo(number), strength=(1.0, 0.5)[number % 2]))
        rows += [replace(plain, image=masked(photo(number)), strength=1.0)] if number % 3 < 2 else []
    apart = [pictures(engine, [row])[0] for row in rows]
    assert len({picture.tobytes() for picture in apart}) == len(rows)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    for place, picture in zip(order, pictures(engine, [rows[place] for place in order]), strict=True):
        assert np.array_equal(picture, apart[place]), rows[place]


def test_what_lies_far_from_the_mask_stays_as_the_autoencoder_has_it(engine):
    (row,) = rows_of(1.0, mask=True)[:1]
    kept = replace(row, image=replace(row.image, mask=np.zeros_like(row.image.mask)))
    drawn, original = pictures(engine, [row, kept]).astype(int)
    assert np.array_equal(original, pictures(engine, [replace(kept, prompt="else", num_inference_steps=2)])[0])
    assert np.abs(drawn - original)[8:24, 12:48].mean() > 5


@pytest.mark.long
def test_less_strength_leaves_more_of_the_picture():
    """The embedded model is trained: its own pictures, redrawn by another prompt, go away from them step by step."""
    spec = ModelSpec(model=str(EMBEDDED_MODEL), safety="none")
    trained = Engine.load(spec, device="cpu", dtype="float32", batch_size=1)
    first = GenerationRequest(
        prompt="a red circle", seed=1, width=256, height=256, num_inference_steps=10, guidance_scale=3
    )
    source = SourceImage(pixels=pictures(trained, [first])[0])
    rows = [replace(first, prompt="a blue square", image=source, strength=strength) for strength in (0.1, 0.3, 1.0)]
    far = [np.abs(found.astype(int) - source.pixels).mean() for found in pictures(trained, rows)]
    assert far == sorted(far)
    assert far[2] > 3 * far[0]


def test_an_image_of_many_requests_is_read_and_encoded_once(engine, monkeypatch):
    counted = {"read": 0, "encoded": 0}

    @dataclass(frozen=True)
    class Counted:
        def read(self, width: int, height: int) -> SourceImage:
            counted["read"] += 1
            return photo(0)

    posterior = type(engine._models.autoencoder).posterior

    def encode(self, pixels):
        counted["encoded"] += 1
        return posterior(self, pixels)

    monkeypatch.setattr(type(engine._models.autoencoder), "posterior", encode)
    pictures(engine, [replace(row, image=Counted()) for row in rows_of(0.5, steps=2)])
    assert counted == {"read": 1, "encoded": 1}


def test_a_codebooks_latents_are_not_drawn(tmp_path):
    engine = load(write_ldm(tmp_path / "vq", "vq"))
    assert len({picture.tobytes() for picture in pictures(engine, rows_of(0.5, steps=4))}) == 4


def test_a_request_that_cannot_start_fails_alone_with_its_reason(engine):
    good = rows_of(0.5)[0]

    class Gone:
        def read(self, width: int, height: int) -> SourceImage:
            raise EngineError(f"no picture of {width}x{height}")

    bad = {
        "an image and its strength go together": replace(good, strength=None),
        "has no image": replace(good, image=None),
        "less than one step; use 0.25 or more": replace(good, strength=0.1),
        "strength 1.5 is outside": replace(good, strength=1.5),
        "the image is 64x32, the request 32x32": replace(good, width=32),
        "no picture of 64x32": replace(good, image=Gone()),
    }
    results = engine.generate([good, *bad.values()])
    assert results[0].error is None
    for reason, result in zip(bad, results[1:], strict=True):
        assert result.pixels is None
        assert reason in str(result.error)


def test_an_inpainting_unet_is_refused_by_its_name(sd1, tmp_path):
    folder = write_sd1(tmp_path / "inpainting")
    unet((32, 64, 64, 64), 64, (True, True, True, False), attention_head_dim=8, in_channels=9).save_pretrained(
        folder / "unet"
    )
    with pytest.raises(EngineError, match="is an inpainting U-Net, which takes 9 channels and not 4"):
        describe_model(folder)
