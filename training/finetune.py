"""Fine-tunes of the embedded model, each in one style: `python -m training.finetune`, a few minutes a style on a CPU.

The whole U-Net goes on learning from the shipped weights, on pictures in the style; text encoder and autoencoder stay.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from latentmill.engine import EMBEDDED_MODEL
from latentmill.engine.latent_diffusion import LatentDiffusion
from training import export
from training.common import RunningAverage, learning_rate, set_learning_rate
from training.styles import LOOKS, Lessons, velocity_loss

PEAK_RATE = 5e-4
BATCH = 16
DECAY = 0.98
"""Of the average of the weights that is kept: some fifty steps."""


def train(model: LatentDiffusion, latents: Tensor, contexts: Tensor, empty: Tensor, steps: int) -> dict[str, Tensor]:
    """The U-Net's weights after so many steps; the model's own stay as they are."""
    torch.manual_seed(0)
    unet = copy.deepcopy(model.denoiser).requires_grad_()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    average, generator = RunningAverage(unet, DECAY), torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step / steps, PEAK_RATE))
        loss = velocity_loss(unet, model.schedule, latents, contexts, empty, BATCH, generator)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet)
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss={sum(losses[-50:]) / 50:.4f}", flush=True)
    return average.values


def write(folder: Path, unet: dict[str, Tensor]) -> Path:
    """The embedded model with this U-Net, as a diffusers folder; the card, which is of the shipped weights, is not."""
    shutil.copytree(EMBEDDED_MODEL, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md"))
    export.write_unet(folder, unet)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.finetune", description="Fine-tune the embedded model.")
    parser.add_argument("--style", choices=tuple(LOOKS), action="append", help="all of them unless named")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--folder", type=Path, required=True, help="each style's model becomes a folder in it")
    arguments = parser.parse_args()
    lessons = Lessons.prepare()
    for name in arguments.style or LOOKS:
        began = time.process_time()
        latents = lessons.latents(LOOKS[name])
        unet = train(lessons.model, latents, lessons.contexts, lessons.empty, arguments.steps)
        print(f"{write(arguments.folder / name, unet)}: {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
