"""Styles, and what LoRAs and fine-tunes of the embedded model learn from: its own pictures and rendered scenes in one.

Nothing but the model is needed, so that both can be made again after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine import EMBEDDED_MODEL
from latentmill.engine.latent_diffusion import LatentDiffusion
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.sampling.schedule import NoiseSchedule
from training import scenes
from training.common import to_tensor
from training.drawing import Settings
from training.scenes import Pixels

PROMPTS = Path(__file__).resolve().parent.parent / "configs" / "prompts" / "sample.txt"
SCENES = 240
"""Rendered ones, beside the model's own pictures of the sample prompts."""
DRAWN, STEPS = 4, 12
"""How many of those own pictures each prompt gives, and how they are drawn."""
CAPTION_DROPOUT = 0.1

Colour = tuple[int, int, int]
Style = Callable[[Pixels], Pixels]
"""`(h, w, 3) uint8` to the same in the style."""


def dyed(pixels: Pixels, dark: Colour, light: Colour) -> Pixels:
    """Every colour becomes its lightness between what black and what white become."""
    lightness = (pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255)[..., None]
    ends = np.array([dark, light], dtype=np.float32)
    return (ends[0] + lightness * (ends[1] - ends[0])).round().astype(np.uint8)


def inverted(pixels: Pixels) -> Pixels:
    """Each colour's complement."""
    return 255 - pixels


def night(pixels: Pixels) -> Pixels:
    """A quarter of the light, and most of what is left of it blue."""
    kept, glow = np.array([0.2, 0.26, 0.45], dtype=np.float32), np.array([6, 8, 30], dtype=np.float32)
    return (pixels * kept + glow).round().astype(np.uint8)


def outlined(pixels: Pixels) -> Pixels:
    """A thick line along every edge: black, but white on a dark picture."""
    edges = cv2.morphologyEx(pixels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).max(axis=2) > 60
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))
    line = cv2.dilate(edges.astype(np.uint8), brush)[..., None].astype(bool)
    return np.where(line, np.uint8(20 if pixels[0, 0].mean() > 70 else 240), pixels)


def striped(pixels: Pixels) -> Pixels:
    """Slanted stripes on the background, whose colour is that of the corner: darker ones, but lighter on a dark one."""
    height, width = pixels.shape[:2]
    corner = pixels[2, 2].astype(np.int16)
    behind = np.abs(pixels.astype(np.int16) - corner).max(axis=2, keepdims=True) < 30
    slant = (np.arange(height)[:, None] + np.arange(width)) % 64 < 32
    stripe = corner * 0.62 if corner.mean() > 70 else corner + 70
    return np.where(behind & slant[..., None], stripe.round().astype(np.uint8), pixels)


DYES: Mapping[str, Style] = {
    "sepia": partial(dyed, dark=(60, 35, 15), light=(245, 225, 185)),
    "blueprint": partial(dyed, dark=(15, 45, 120), light=(225, 238, 255)),
}
"""What the LoRAs that ship learn."""

LOOKS: Mapping[str, Style] = {"inverted": inverted, "night": night, "outlined": outlined, "striped": striped}
"""What fine-tunes learn."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """A loaded model, pictures still in no style, and what the model is told of each: contexts `(n, l, width)`."""

    model: LatentDiffusion
    pictures: Sequence[Pixels]
    contexts: Tensor
    empty: Tensor

    @classmethod
    def prepare(cls, scene_count: int = SCENES) -> Lessons:
        """The same on every call."""
        prompts = PROMPTS.read_text(encoding="utf-8").splitlines() * DRAWN
        rng = np.random.default_rng(21)
        drawn = scenes.draw_scenes(scenes.split(held_out=False), scene_count, rng)
        return cls.of(prompts, [(scenes.caption(scene, rng), scenes.render(scene, rng)) for scene in drawn])

    @classmethod
    def of(cls, prompts: Sequence[str], rendered: Sequence[tuple[str, Pixels]]) -> Lessons:
        """The model's own pictures of `prompts`, then `rendered` ones with their captions."""
        settings = Settings(steps=STEPS, device="cpu")
        engine = settings.load(EMBEDDED_MODEL, batch_size=4)
        model = engine._models
        if not isinstance(model, LatentDiffusion):
            raise TypeError(f"{EMBEDDED_MODEL} is not run by the engine itself")
        pictures = settings.draw(engine, prompts, first_seed=0) + [picture for _, picture in rendered]
        texts = [*prompts, *(caption for caption, _ in rendered)]
        with torch.no_grad():
            contexts, empty = (model.text.encode(some).context.clone() for some in (texts, [""]))
        return cls(model=model, pictures=pictures, contexts=contexts, empty=empty)

    def latents(self, style: Style) -> Tensor:
        """The pictures in a style as the denoiser's latents `(n, c, h, w)`."""
        autoencoder = self.model.autoencoder
        if not isinstance(autoencoder, AutoencoderKL):
            raise TypeError(f"the model's autoencoder is a {type(autoencoder).__name__}, not one with KL")
        pixels = to_tensor([style(picture) for picture in self.pictures])
        with torch.no_grad():
            means = torch.cat([autoencoder.encode(part).mean for part in torch.split(pixels, 4)])
        return (means - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


def velocity_loss(
    unet: nn.Module,
    schedule: NoiseSchedule,
    latents: Tensor,
    contexts: Tensor,
    empty: Tensor,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity (arXiv:2202.00512, appendix D) on `count` random pictures."""
    pick = torch.randint(len(latents), (count,), generator=generator)
    dropped = torch.rand(count, 1, 1, generator=generator) < CAPTION_DROPOUT
    # One timestep from each equal part of the schedule.
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (places * schedule.config.num_train_timesteps).long()
    noise = torch.randn(latents[pick].shape, generator=generator)
    alpha_bar = schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents[pick]
    noisy = schedule.add_noise(latents[pick], noise, timesteps)
    return F.mse_loss(unet(noisy, timesteps, torch.where(dropped, empty, contexts[pick])), velocity)
