"""First stage: a KL-regularised autoencoder (arXiv:2112.10752, section 3.1) learned from rendered pictures.

Loss: L1, an L1 on chroma (hue is a small part of plain L1 and was learned last without it), a Laplacian-pyramid L1
in place of a perceptual network (none with a clear licence is at hand offline), a light KL, and in the last part of
the budget a small patch discriminator (hinge loss, with feature matching).
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.blocks import Downsample, ResnetBlock, Upsample
from training import architecture, icons, parallel, scenes
from training.common import (
    RunningAverage,
    contact_sheet,
    device,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
    to_pictures,
    to_tensor,
)

CHECKPOINT = "autoencoder.pt"
PEAK_RATE = 1.5e-3
ADVERSARIAL_FROM = 0.8
# (until this part of the budget, side of the square seen, squares per process and step): colour and coarse form need
# many steps rather than many pixels, so the first steps see small crops.
DIET = ((0.3, 64, 16), (0.75, 128, 8), (1.0, scenes.IMAGE_SIZE, 3))
CROPS_PER_PICTURE = 4
CHROMA_WEIGHT, PYRAMID_WEIGHT, KL_WEIGHT = 1.0, 1.0, 6e-3
ADVERSARIAL_WEIGHT, FEATURE_WEIGHT = 0.02, 0.5
CHECKPOINT_SECONDS = 45.0
SHEET_SECONDS = 90.0


class Discriminator(nn.Module):
    """Patch discriminator: (n, 3, h, w) -> logits per patch and the features below them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.layers = nn.ModuleList(
            [nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)]
        )
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            pixels = F.leaky_relu(layer(pixels), 0.2)
            features.append(pixels)
        return self.head(pixels), features


@torch.no_grad()
def begin_linear(model: AutoencoderKL) -> None:
    """Initialise so that both halves first do nothing but average cells and carry their colours along.

    With torch's usual initialisation the random residual branches drown the colour, and twenty minutes on two cores
    are over before it is found again: zero branches, averaging downsamplers, copying upsamplers, orthogonal widenings.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(torch.as_tensor(module.conv2.bias))
        if isinstance(module, Downsample):
            nn.init.zeros_(module.conv.weight)
            width = len(module.conv.weight)
            module.conv.weight[torch.arange(width), torch.arange(width), :2, :2] = 0.25
        if isinstance(module, Upsample):
            nn.init.dirac_(module.conv.weight)
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            nn.init.orthogonal_(module.weight)
    for widening in (model.encoder.conv_in, model.decoder.conv_in):
        nn.init.zeros_(widening.weight)
        nn.init.orthogonal_(centre := torch.empty(widening.weight.shape[:2]))
        widening.weight[:, :, 1, 1] = centre
    # A narrow posterior: under unit noise the first minutes would learn nothing.
    nn.init.constant_(torch.as_tensor(model.quant_conv.bias)[architecture.LATENT_CHANNELS :], -4.0)


class Pictures:
    """An endless stream of training pictures: half scenes, half icons."""

    def __init__(self, work: Path, rng: np.random.Generator) -> None:
        self.rng = rng
        self.sprites = icons.load_sprites(work / "npm")
        self.scenes = scenes.split(held_out=False)

    def batch(self, count: int, side: int = scenes.IMAGE_SIZE) -> Tensor:
        """`count` pictures, or random square crops of fewer pictures: (count, 3, side, side) in [-1, 1]."""
        wanted = count if side == scenes.IMAGE_SIZE else max(count // CROPS_PER_PICTURE, 2)
        share = (wanted + int(self.rng.integers(2))) // 2
        pictures = [scenes.render(scene, self.rng) for scene in scenes.draw_scenes(self.scenes, share, self.rng)]
        drawn = icons.draw_icons(list(icons.NAMES), wanted - share, self.rng)
        pictures += [icons.render(icon, self.sprites, self.rng) for icon in drawn]
        if side < scenes.IMAGE_SIZE:
            corners = self.rng.integers(0, scenes.IMAGE_SIZE - side + 1, (count, 2))
            pictures = [
                pictures[index % wanted][y : y + side, x : x + side] for index, (y, x) in enumerate(corners.tolist())
            ]
        return to_tensor(pictures)


def chroma(pixels: Tensor) -> Tensor:
    """The two colour-difference planes (BT.601, unscaled): (n, 3, h, w) -> (n, 2, h, w)."""
    luma = 0.299 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]
    return torch.cat([pixels[:, 2:] - luma, pixels[:, :1] - luma], dim=1)


def pyramid_distance(a: Tensor, b: Tensor, levels: int = 4) -> Tensor:
    """Mean L1 between Laplacian bands: edges at several scales weigh as much as the flat areas between them."""
    total = a.new_zeros(())
    rest = a - b
    for _ in range(levels):
        coarse = F.avg_pool2d(rest, 2)
        total = total + (rest - F.interpolate(coarse, scale_factor=2.0, mode="nearest")).abs().mean()
        rest = coarse
    return total + rest.abs().mean()


def reconstruction_loss(autoencoder: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss without its adversarial part, the reconstruction, and figures for the progress line."""
    posterior = autoencoder.encode(pixels)
    decoded = autoencoder.decode(posterior.sample())
    plain = (decoded - pixels).abs().mean()
    colour = (chroma(decoded) - chroma(pixels)).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss = plain + CHROMA_WEIGHT * colour + PYRAMID_WEIGHT * pyramid_distance(decoded, pixels) + KL_WEIGHT * kl
    mse = F.mse_loss(decoded.detach().clamp(-1, 1), pixels)
    figures = {
        "psnr": float(10 * torch.log10(4 / mse)),
        "kl": float(kl.detach()),
        "mean_std": float(posterior.mean.detach().std()),
        "noise_std": float(torch.exp(0.5 * posterior.logvar.detach()).mean()),
    }
    return loss, decoded, figures


def adversarial_losses(critic: Discriminator, pixels: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """(generator's loss: hinge and feature matching, critic's hinge loss)."""
    fake_logits, fake_features = critic(decoded)
    real_logits, real_features = critic(pixels)
    matching = torch.stack(
        [F.l1_loss(fake, real.detach()) for fake, real in zip(fake_features, real_features, strict=True)]
    ).mean()
    generator = -ADVERSARIAL_WEIGHT * fake_logits.mean() + FEATURE_WEIGHT * matching
    again, _ = critic(decoded.detach())
    return generator, 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + again).mean())


def train(work: Path, minutes: float) -> Path:
    """Train for `minutes` in all, going on from the checkpoint in `work`; returns the checkpoint's path."""
    icons.load_sprites(work / "npm")  # rendered once here, before several processes want them
    parallel.launch(_work, work, minutes)
    return work / CHECKPOINT


def _work(rank: int, work: Path, minutes: float) -> None:
    """One process's share of the training; the first one also keeps the average, checkpoints and sheets."""
    torch.manual_seed(0)
    where = device()
    model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE)).to(where)
    begin_linear(model)
    critic = Discriminator().to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=PEAK_RATE / 2, betas=(0.5, 0.98))
    average = RunningAverage(model, 0.998)
    parts: dict[str, Any] = {
        "model": model, "critic": critic, "optimizer": optimizer, "critic_optimizer": critic_optimizer,
    }  # fmt: skip
    elapsed, step = 0.0, 0
    checkpoint = load_checkpoint(work / CHECKPOINT)
    if checkpoint is not None:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        average.load(checkpoint["average"])
        elapsed, step = checkpoint["elapsed"], checkpoint["step"]
    pictures = Pictures(work, np.random.default_rng([1, step, rank]))
    torch.manual_seed(1000 * step + rank)  # the posterior's noise differs between processes

    def save() -> None:
        states = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(work / CHECKPOINT, {**states, "average": average.state(), "elapsed": elapsed, "step": step})

    budget, last, saved, shown = minutes * 60, time.monotonic(), elapsed, elapsed
    while elapsed < budget:
        progress = elapsed / budget
        set_learning_rate(optimizer, learning_rate(progress, PEAK_RATE))
        figures = _step(model, critic, optimizer, critic_optimizer, pictures, progress)
        step += 1
        now = time.monotonic()
        elapsed, last = parallel.agree(elapsed + now - last), now
        if rank > 0:
            continue
        average.update(model)
        if step % 50 == 0:
            line = " ".join(f"{name}={value:.3f}" for name, value in figures.items())
            print(f"autoencoder {elapsed / 60:5.1f}/{minutes:g} min step {step} {line}", flush=True)
        if elapsed - saved > CHECKPOINT_SECONDS:
            save()
            saved = elapsed
        if elapsed - shown > SHEET_SECONDS:
            _sheet(model, pictures, work / "sheets" / f"autoencoder-{int(elapsed):05d}.png")
            shown = elapsed
    if rank == 0:
        save()


def _step(
    model: AutoencoderKL,
    critic: Discriminator,
    optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    pictures: Pictures,
    progress: float,
) -> dict[str, float]:
    """One update of the autoencoder, and late in the budget one of the critic."""
    adversarial = progress >= ADVERSARIAL_FROM
    _, side, count = next((entry for entry in DIET if progress < entry[0]), DIET[-1])
    pixels = pictures.batch(count, side).to(device())
    loss, decoded, figures = reconstruction_loss(model, pixels)
    if adversarial:
        generator_loss, critic_loss = adversarial_losses(critic, pixels, decoded)
        loss = loss + generator_loss
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    parallel.average_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if adversarial:
        critic_optimizer.zero_grad(set_to_none=True)  # also drops what the generator's loss left here
        torch.autograd.backward(critic_loss)
        parallel.average_gradients(critic)
        critic_optimizer.step()
        figures["critic"] = float(critic_loss.detach())
    figures["loss"] = float(loss.detach())
    return figures


@torch.no_grad()
def _sheet(model: AutoencoderKL, pictures: Pictures, path: Path) -> None:
    """Originals above their reconstructions."""
    pixels = pictures.batch(8).to(device())
    contact_sheet(to_pictures(pixels) + to_pictures(model.decode(model.encode(pixels).mean)), path)
