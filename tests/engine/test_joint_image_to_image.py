"""Stable Diffusion 3 and Flux from a picture, with and without a mask: as diffusers' pipelines for it draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from PIL import Image

from latentmill.engine import Engine, GenerationRequest
from tests.engine.diffusers_models import write_flux, write_sd3
from tests.engine.families import assert_same_pictures
from tests.engine.test_image_to_image import masked, photo
from tests.engine.test_joint_transformers import load, pictures, rows_for

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

WRITERS: dict[str, Callable[[Path], Path]] = {
    # diffusers blends what is behind a mask for the published number of channels alone
    "sd3": lambda folder: write_sd3(folder, channels=16),
    "flux-dev": write_flux,
}
PIPELINES: dict[tuple[str, bool], Any] = {
    ("sd3", False): StableDiffusion3Img2ImgPipeline,
    ("sd3", True): StableDiffusion3InpaintPipeline,
    ("flux-dev", False): FluxImg2ImgPipeline,
    ("flux-dev", True): FluxInpaintPipeline,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("joint-images")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    return {name: load(folder) for name, folder in folders.items()}


def rows_of(name: str, strength: float, *, mask: bool) -> list[GenerationRequest]:
    rows = rows_for(name, steps=4)
    sources = [masked(photo(row.seed)) if mask else photo(row.seed) for row in rows]
    return [replace(row, image=source, strength=strength) for row, source in zip(rows, sources, strict=True)]


def reference(folder: Path, rows: list[GenerationRequest], *, mask: bool) -> np.ndarray:
    """What the library's pipeline draws for the same requests, from the same pictures and noise.

    Its pipeline for SD3 behind masks takes the autoencoder's shift from what it encodes, and forgets to add it again
    before it decodes: there its latents are decoded as its other pipelines do.
    """
    pipeline = PIPELINES[folder.name, mask].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    first, sources = rows[0], [row.image for row in rows]
    extra: dict[str, Any] = {}
    if mask:
        extra["mask_image"] = [Image.fromarray(source.mask.astype(np.uint8) * 255) for source in sources]
    if any(row.negative_prompt for row in rows):
        extra["negative_prompt"] = [row.negative_prompt for row in rows]
    forgets = mask and folder.name == "sd3"
    found = pipeline(
        [row.prompt for row in rows],
        image=[Image.fromarray(source.pixels) for source in sources],
        width=first.width,
        height=first.height,
        strength=first.strength,
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        output_type="latent" if forgets else "np",
        **extra,
    ).images
    if forgets:
        vae = pipeline.vae
        with torch.inference_mode():
            decoded = vae.decode(found / vae.config.scaling_factor + vae.config.shift_factor).sample
        found = pipeline.image_processor.postprocess(decoded, output_type="np")
    return (found * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("strength", "mask"),
    [
        (0.5, False),
        pytest.param(1.0, False, marks=pytest.mark.long),
        pytest.param(0.75, True, marks=pytest.mark.long),
        (1.0, True),
    ],
)
@pytest.mark.parametrize("name", WRITERS)
def test_pictures_from_pictures_equal_the_reference_pipelines(name, strength, mask, folders, engines):
    rows = rows_of(name, strength, mask=mask)
    assert_same_pictures(pictures(engines[name], rows), reference(folders[name], rows, mask=mask))


@pytest.mark.parametrize("name", [pytest.param("sd3", marks=pytest.mark.long), "flux-dev"])
def test_a_rows_bits_do_not_depend_on_what_starts_beside_it(name, engines):
    """By both samplers, from a picture, behind a mask and from noise, in any order."""
    plain = rows_for(name, steps=2)[0]
    rows = [
        replace(plain, seed=number, sampler=sampler, image=source, strength=strength)
        for number, (sampler, source, strength) in enumerate(
            [
                ("euler", None, None),
                ("dpmpp_2m", photo(1), 0.5),
                ("euler", masked(photo(2)), 1.0),
                ("dpmpp_2m", masked(photo(3)), 1.0),
                ("euler", photo(4), 1.0),
            ]
        )
    ]
    apart = [pictures(engines[name], [row])[0] for row in rows]
    assert len({picture.tobytes() for picture in apart}) == len(rows)
    assert np.array_equal(pictures(engines[name], rows[::-1])[::-1], apart)
