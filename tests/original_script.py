"""The original's script, written from its description around the reference library's networks: the judge of pictures.

And a small Stable Diffusion 1 for it to draw with, as a folder of the reference library and as the original's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import StableDiffusionPipeline

from latentmill.jobs.txt2img.drawing import Txt2ImgPlan, generate_batches, load_engine, plan_txt2img
from latentmill.jobs.txt2img.options import DEFAULT_CONFIG, parse_options
from tests.engine.families import write_sd1
from tests.engine.originals import write_ckpt

ROOT = Path(__file__).parents[1]
SCHEDULE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
"""Signal power of the published models at each timestep."""
SMALL = ("--H", 64, "--W", 64, "--n_samples", 2, "--prompt", "a cat", "--skip_save", "--skip_grid", "--f", 4)


def own_schedule(powers: np.ndarray = SCHEDULE) -> torch.Tensor:
    """The buffer `alphas_cumprod` of a checkpoint."""
    return torch.tensor(powers, dtype=torch.float32)


def small_config() -> dict[str, Any]:
    """The shipped config, with the widths of the small model."""
    content: dict[str, Any] = yaml.safe_load((ROOT / DEFAULT_CONFIG).read_text())
    params = content["model"]["params"]
    params["unet_config"]["params"] |= {
        "model_channels": 32,
        "channel_mult": [1, 2, 2, 2],
        "context_dim": 64,
        "num_res_blocks": 1,
    }
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 2]}
    return content


def write_small_sd1(root: Path) -> Path:
    """`folder` of diffusers, `model.ckpt` of the original key names with its schedule, `config.yaml`."""
    write_ckpt(write_sd1(root / "folder"), root / "model.ckpt", changes={"alphas_cumprod": own_schedule()})
    config = small_config()
    config["model"]["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": str(root / "folder")},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def plan(*arguments: object) -> Txt2ImgPlan:
    return plan_txt2img(parse_options([str(argument) for argument in arguments]))


def our_pictures(drawing: Txt2ImgPlan) -> np.ndarray:
    """What the command draws, `(n, h, w, 3) uint8`."""
    results = [result for batch in generate_batches(drawing, load_engine(drawing)) for result in batch]
    assert [result.error for result in results] == [None] * len(results)
    return np.stack([result.pixels for result in results])


@torch.inference_mode()
def originals_pictures(
    pipeline: StableDiffusionPipeline | Path,
    prompt: str = "a cat",
    *,
    plms: bool = False,
    steps: int = 4,
    eta: float = 0.0,
    scale: float = 7.5,
    fixed: bool = False,
    batches: int = 2,
    powers: np.ndarray = SCHEDULE,
    scale_factor: float = 0.18215,
) -> np.ndarray:
    """Two pictures a batch of 64 x 64 pixels, by the signal power of each timestep."""
    if isinstance(pipeline, Path):
        pipeline = load_reference(pipeline)
    total = len(powers)
    times = [number + 1 for number in range(0, total, total // steps)]
    levels = [float(powers[time]) for time in times]
    lower = [float(powers[0]), *levels[:-1]]

    def encode(text: str) -> torch.Tensor:
        ids = pipeline.tokenizer([text] * 2, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return pipeline.text_encoder(ids.input_ids)[0]

    def predict(x: torch.Tensor, index: int) -> torch.Tensor:
        if scale == 1:
            return pipeline.unet(x, times[index], encode(prompt)).sample
        empty, full = (pipeline.unet(x, times[index], encode(text)).sample for text in ("", prompt))
        return empty + scale * (full - empty)

    def step(x: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        here, there = levels[index], lower[index]
        sigma = eta * ((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
        data = (x - (1 - here) ** 0.5 * noise) / here**0.5
        return there**0.5 * data + (1 - there - sigma**2) ** 0.5 * noise + sigma * torch.randn(x.shape)

    def batch(x: torch.Tensor) -> Iterator[np.ndarray]:
        history: list[torch.Tensor] = []
        for index in reversed(range(len(times))):
            noise = predict(x, index)
            combined = noise
            if plms and not history:
                combined = (noise + predict(step(x, noise, index), max(index - 1, 0))) / 2
            elif plms:
                weights = {1: (3, -1, 2), 2: (23, -16, 5, 12), 3: (55, -59, 37, -9, 24)}[len(history)]
                terms = zip(weights[:-1], [noise, *reversed(history)], strict=True)
                combined = sum(weight * term for weight, term in terms) / weights[-1]
            history = [*history, noise][-3:]
            x = step(x, combined, index)
        decoded = pipeline.vae.decode(x / scale_factor).sample
        pixels = torch.clamp((decoded + 1) / 2, 0, 1).permute(0, 2, 3, 1).numpy()
        yield from (255.0 * pixels).astype(np.uint8)

    torch.manual_seed(42)
    shape = (2, 4, 16, 16)
    code = torch.randn(shape) if fixed else None
    return np.stack(
        [picture for _ in range(batches) for picture in batch(torch.randn(shape) if code is None else code)]
    )


def load_reference(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


def assert_the_originals(found: np.ndarray, expected: np.ndarray) -> None:
    """Within one level, and equal in nearly all places: rounded pixels would differ in half of them."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1, f"{difference.max()} of 255"
    assert (difference > 0).mean() < 0.01
    assert found.std() > 5
