"""Half precision on a CUDA device against diffusers': each family at small width, and the published widths.

What half precision costs is not known beforehand, so the reference is the judge of it: ours must be as near to full
precision as diffusers' own half precision on the same device is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentmill.engine import Engine, ModelSpec, acceleration
from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.unet import UNet
from tests.gpu.test_cuda import SD15, SD21, SDXL, VAE

diffusers = pytest.importorskip("diffusers", reason="the reference library is not on this machine")
families = pytest.importorskip("tests.engine.families")

pytestmark = pytest.mark.gpu

WRITERS = {"sd1": "write_sd1", "sd2": "write_sd2", "sdxl": "write_sdxl", "ldm": "write_ldm"}
SLACK = 1.25
"""How much further than the reference's half precision ours may be: both round, at other places."""


def error(found: Any, exact: Any) -> float:
    """Root mean square distance."""
    return float(((found - exact) ** 2).mean() ** 0.5)


def pictures(folder: Path, dtype: str, rows: list[Any]) -> np.ndarray:
    spec = ModelSpec(model=str(folder), safety="none")
    engine = Engine.load(spec, device="cuda", dtype=dtype, batch_size=len(rows))
    results = engine.generate(rows)
    assert {result.status for result in results} == {"ok"}
    return np.stack([result.pixels for result in results]).astype(float)


def reference(folder: Path, dtype: torch.dtype, rows: list[Any]) -> np.ndarray:
    options = {} if "ldm" in folder.name else {"safety_checker": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options).to("cuda")
    with full_precision_noise():
        return families.reference_pictures(pipeline, rows).astype(float)


@contextmanager
def full_precision_noise() -> Iterator[None]:
    """Noise of the reference is drawn in float32 and rounded, as ours is: in float16 a seed gives other numbers."""
    from diffusers.utils import torch_utils

    drawn = torch_utils.randn_tensor
    modules = [module for name, module in sys.modules.items() if name.startswith("diffusers.pipelines.")]

    def rounded(*arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        return drawn(*arguments, dtype=torch.float32, **options).to(dtype)

    with pytest.MonkeyPatch.context() as patched:
        for module in (each for each in modules if "randn_tensor" in vars(each)):
            patched.setattr(module, "randn_tensor", rounded)
        yield


@pytest.mark.filterwarnings("ignore:Keyword arguments .* are not expected")
@pytest.mark.parametrize("family", WRITERS)
def test_each_family_draws_the_references_pictures(tmp_path, family):
    folder = getattr(families, WRITERS[family])(tmp_path / family)
    rows = families.requests(64)
    exact = reference(folder, torch.float32, rows)
    families.assert_same_pictures(pictures(folder, "float32", rows), exact)
    ours, theirs = (
        error(found, exact) for found in (pictures(folder, "float16", rows), reference(folder, torch.float16, rows))
    )
    print(f"{family}: fp16 is {ours:.3f} levels off, diffusers {theirs:.3f}")
    assert theirs < 5, "the reference drew from other noise, and judges nothing"
    assert ours <= SLACK * theirs + 0.1


def with_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.nn.Module:
    """Ours with the reference's weights; some of them are 1x1 convolutions there and linear layers here."""
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    ours.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in theirs.state_dict().items()})
    return acceleration.arrange(ours.eval())


@torch.inference_mode()
@pytest.mark.parametrize(("config", "side"), [(SD15, 64), (SD21, 96), (SDXL, 128)], ids=["sd15", "sd21", "sdxl"])
def test_a_unet_of_published_width_is_as_exact_as_the_references(config, side):
    torch.manual_seed(0)
    parsed = UNetConfig.from_dict(config)
    with torch.device("cuda"):
        theirs = diffusers.UNet2DConditionModel(**config).eval()
        ours = with_weights(UNet(parsed), theirs)
        latents, context = torch.randn(2, 4, side, side), torch.randn(2, 77, parsed.context_dim)
        timesteps, extra = torch.tensor([900.0, 100.0]), {}
        if parsed.projection_input_dim:
            extra = {"pooled": torch.randn(2, 1280), "time_ids": torch.full((2, 6), 1024.0)}

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        given = [latents.to(dtype), timesteps, context.to(dtype)]
        more = {"pooled": extra["pooled"].to(dtype), "time_ids": extra["time_ids"]} if extra else {}
        added = {"text_embeds": more["pooled"], "time_ids": more["time_ids"]} if extra else None
        found = ours.to(dtype)(*given, **more).float()
        return found, theirs.to(dtype)(*given, added_cond_kwargs=added).sample.float()

    full, exact = run(torch.float32)
    assert (full - exact).abs().max() <= 1e-4 * exact.abs().max()
    found, expected = run(torch.float16)
    print(f"fp16: {error(found, exact):.2e} off, diffusers {error(expected, exact):.2e}")
    assert error(found, exact) <= SLACK * error(expected, exact)


@torch.inference_mode()
@pytest.mark.parametrize("side", [64, 128])
def test_a_decoder_of_published_width_is_the_references(side):
    torch.manual_seed(0)
    levels = len(VAE["block_out_channels"])
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    with torch.device("cuda"):
        theirs = diffusers.AutoencoderKL(**VAE, **kinds).eval()
        ours = with_weights(AutoencoderKL(VAEConfig.from_dict(VAE)), theirs)
        latents = torch.randn(2, 4, side, side)
    expected = theirs.decode(latents).sample
    assert (acceleration.decode(ours, latents) - expected).abs().max() <= 1e-4 * expected.abs().max()
    # One picture at 1024 px is what the slices give for two as well.
    alone = acceleration.decode(ours, latents[1:])
    assert (alone - expected[1:]).abs().max() <= 1e-4 * expected.abs().max()
