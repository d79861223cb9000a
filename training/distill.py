"""A LoRA that makes the embedded model draw in 4 steps: `python -m training.distill`, some minutes on one core.

Latent consistency distillation (arXiv:2310.04378, algorithm 1) of low rank (arXiv:2311.05556). The model with its
guidance is the teacher: one of its DDIM steps, from one of 50 timesteps to the next, must not change the x0 that the
student tells. Sampler `lcm` draws with it, at guidance 1.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latentmill.engine.sampling.schedule import NoiseSchedule
from training import icons, lora, pairs, scenes
from training.drawing import GUIDANCE
from training.styles import Lessons

FILE = lora.FOLDER / "lcm.safetensors"
RANK, RATE, BATCH = 16, 1e-4, 16
LAYERS = ("blocks", "mid_block", "conv_in", "conv_out", "time_embedding")
TIMESTEPS = 50  # of the teacher, evenly spaced, as the sampler's are chosen from
SIGMA_DATA = 0.5  # of the consistency function, as samplers have it
HUBER = 0.03  # per number of the latents
SCENES, PAIRS = 300, 400
"""Rendered pictures, beside the model's own icons."""


def lessons() -> Lessons:
    """All that the model can draw: its own icons, and rendered scenes and pairs. The same on every call."""
    rng = np.random.default_rng(31)
    ground = [name for name in scenes.BACKGROUNDS if name != "white"]
    prompts = [
        icons.caption(icons.Icon(name=name, style=style, background=background))
        for name in icons.NAMES
        for style in icons.STYLES
        for background in ("white", str(rng.choice(ground)))
    ]
    one = scenes.draw_scenes(scenes.split(held_out=False), SCENES, rng)
    two = pairs.draw_pairs(PAIRS, rng, held_out=False)
    rendered = [(scenes.caption(scene, rng), scenes.render(scene, rng)) for scene in one]
    rendered += [(pairs.caption(pair, rng), pairs.render(pair, rng)) for pair in two]
    return Lessons.of(prompts, rendered)


class Distillation:
    """The loss of one student against the model as it is now."""

    def __init__(self, student: nn.Module, schedule: NoiseSchedule, found: Lessons, latents: Tensor) -> None:
        self.student, self.teacher = student, copy.deepcopy(student)
        self.schedule, self.lessons, self.latents = schedule, found, latents
        self.stride = schedule.config.num_train_timesteps // TIMESTEPS
        self.generator = torch.Generator().manual_seed(0)

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """(n,) timesteps -> (n, 1, 1, 1); below 0 there is no noise."""
        levels = self.schedule.alphas_cumprod[timesteps.clamp(min=0)]
        return torch.where(timesteps < 0, 1.0, levels).reshape(-1, 1, 1, 1)

    def split(self, velocity: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, noise) that a velocity tells (arXiv:2202.00512, appendix D)."""
        signal, noise = self.alpha_bar(timesteps).sqrt(), (1 - self.alpha_bar(timesteps)).sqrt()
        return signal * noisy - noise * velocity, signal * velocity + noise * noisy

    def consistent(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The student's consistency function (arXiv:2303.01469, appendix C): x0, but `noisy` itself without noise."""
        x0, _ = self.split(self.student(noisy, timesteps.clamp(min=0), context), noisy, timesteps)
        scaled = (timesteps.clamp(min=0) * self.schedule.config.timestep_scaling).reshape(-1, 1, 1, 1)
        scaled = torch.where(timesteps.reshape(-1, 1, 1, 1) < 0, 0.0, scaled)
        kept = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
        return kept * noisy + scaled / (scaled.square() + SIGMA_DATA**2).sqrt() * x0

    @torch.no_grad()
    def taught(self, noisy: Tensor, here: Tensor, following: Tensor, context: Tensor) -> Tensor:
        """One DDIM step of the guided teacher, from the timesteps `here` to `following`."""
        both = torch.cat([self.lessons.empty.expand_as(context), context])
        negative, positive = self.teacher(noisy.repeat(2, 1, 1, 1), here.repeat(2), both).chunk(2)
        x0, noise = self.split(negative + GUIDANCE * (positive - negative), noisy, here)
        return self.alpha_bar(following).sqrt() * x0 + (1 - self.alpha_bar(following)).sqrt() * noise

    def __call__(self) -> Tensor:
        pick = torch.randint(len(self.latents), (BATCH,), generator=self.generator)
        # One of the timesteps from each equal part of them.
        places = (torch.randperm(BATCH, generator=self.generator) + torch.rand(BATCH, generator=self.generator)) / BATCH
        here = ((places * TIMESTEPS).long() + 1) * self.stride - 1
        clean, context = self.latents[pick], self.lessons.contexts[pick]
        noisy = self.schedule.add_noise(clean, torch.randn(clean.shape, generator=self.generator), here)
        following = here - self.stride
        target = self.taught(noisy, here, following, context)
        with torch.no_grad():
            wanted = self.consistent(target, following, context)
        distance = (self.consistent(noisy, here, context) - wanted).square().mean(dim=(1, 2, 3))
        return ((distance + HUBER**2).sqrt() - HUBER).mean()


def train(found: Lessons, steps: int) -> dict[str, Tensor]:
    """The LoRA's terms, by the keys that diffusers gives them."""
    torch.manual_seed(0)
    unet = found.model.denoiser
    loss = Distillation(unet, found.model.schedule, found, found.latents(lambda pixels: pixels))
    return lora.learn(unet, loss, steps, RATE, RANK, LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.distill", description="Train the LCM-LoRA that ships.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--file", type=Path, default=FILE)
    arguments = parser.parse_args()
    lora.write(train(lessons(), arguments.steps), arguments.file)


if __name__ == "__main__":
    main()
