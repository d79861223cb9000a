"""First stage: a KL-regularised autoencoder (arXiv:2112.10752, section 3.1) learned from rendered pictures.

Loss: L1, an L1 on chroma (hue is a small part of plain L1 and was learned last without it), the perceptual distance,
a patch critic with the paper's adaptive weight, a light KL. With `frozen` only the decoder learns: the latents, and
all that was ever trained on them, stay what they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.blocks import Downsample, ResnetBlock, Upsample
from training import architecture, icons, parallel, scenes
from training.common import (
    Clock,
    Curve,
    RunningAverage,
    contact_sheet,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
    to_pictures,
)
from training.critic import Critic, critic_loss, eventful, judge
from training.devices import device, place
from training.perceptual import Perceptual
from training.pictures import CROPS_PER_PICTURE, Pictures

CHECKPOINT = "autoencoder.pt"
START = "start.safetensors"  # a finished first stage, folded; where it lies in the work folder, only its decoder learns
PEAK_RATE, FROZEN_RATE = 1e-3, 1.5e-4  # a learned decoder sees few pictures a step: at 1e-3 it loses four decibels
CRITIC_RATE = 1e-3
ADVERSARIAL_FROM = 0.1  # of the budget; the critic learns before, and is listened to when it knows something
# (until this part of the budget, side of the square seen, squares per process and step): colour and coarse form need
# many steps rather than many pixels, so the first steps see small crops. Norms look at all of what they are given, so
# that most of the budget belongs to whole pictures: a decoder used to one loses six decibels on the other.
DIET = ((0.1, 64, 16), (0.35, 128, 4), (1.0, scenes.IMAGE_SIZE, 1))
FROZEN_DIET = ((1.0, scenes.IMAGE_SIZE, 2),)
CHROMA_WEIGHT, PERCEPTUAL_WEIGHT, KL_WEIGHT = 1.0, 0.1, 6e-3  # the first two and L1 weigh about the same
EXTRA_NOISE = 0.15  # of a frozen stage's latents, at most: the second stage's latents are not exact either
CHECKPOINT_SECONDS, SHEET_SECONDS, REPORT_STEPS = 90.0, 300.0, 25


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


def chroma(pixels: Tensor) -> Tensor:
    """The two colour-difference planes (BT.601, unscaled): (n, 3, h, w) -> (n, 2, h, w)."""
    luma = 0.299 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]
    return torch.cat([pixels[:, 2:] - luma, pixels[:, :1] - luma], dim=1)


class Stage:
    """What learns, and one step of it."""

    def __init__(self, pictures: Pictures, frozen: dict[str, Tensor] | None) -> None:
        self.pictures = pictures
        self.frozen = frozen is not None
        self.peak = PEAK_RATE if frozen is None else FROZEN_RATE
        self.model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE))
        if frozen is None:
            begin_linear(self.model)
        else:
            self.model.load_state_dict(frozen)
            self.model.encoder.requires_grad_(requires_grad=False)
            self.model.quant_conv.requires_grad_(requires_grad=False)
        self.critic, self.perceptual = Critic(), Perceptual()
        for part in (self.model, self.critic, self.perceptual):
            place(part)
        learned = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=self.peak, betas=(0.9, 0.98), weight_decay=1e-4)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=CRITIC_RATE, betas=(0.5, 0.98))
        self.average = RunningAverage(self.model, 0.998)

    @property
    def parts(self) -> dict[str, Any]:
        """All that a checkpoint keeps."""
        return {
            "model": self.model, "critic": self.critic,
            "optimizer": self.optimizer, "critic_optimizer": self.critic_optimizer,
        }  # fmt: skip

    def examples(self, count: int, side: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """`count` squares: pixels (count, 3, side, side), latents to decode, KL per latent number if any is learned."""
        whole = side == scenes.IMAGE_SIZE
        pixels = self.pictures.whole(count if whole else max(count // CROPS_PER_PICTURE, 1)).to(device())
        corners = [(0, 0)] * count if whole else self.pictures.corners(count, side)
        source = [index % len(pixels) for index in range(count)]
        crops = [pixels[i, :, y : y + side, x : x + side] for i, (y, x) in zip(source, corners, strict=True)]
        squares = torch.stack(crops).contiguous(memory_format=torch.channels_last)
        if not self.frozen:
            posterior = self.model.encode(squares)
            return squares, posterior.sample(), posterior.kl().mean() / posterior.mean[0].numel()
        # The encoder sees whole pictures, as ever: its norms look at all of what they are given.
        with torch.no_grad():
            latents = self.model.encode(pixels).sample()
        cells, factor = side // architecture.FACTOR, architecture.FACTOR
        cut = torch.stack(
            [
                latents[i, :, y // factor : y // factor + cells, x // factor : x // factor + cells]
                for i, (y, x) in zip(source, corners, strict=True)
            ]
        )
        strength = torch.rand(count, 1, 1, 1, device=cut.device) * EXTRA_NOISE
        return squares, cut + strength * torch.randn_like(cut), None

    def step(self, progress: float) -> dict[str, float]:
        """One update of what learns and one of the critic; figures for the progress line."""
        diet = FROZEN_DIET if self.frozen else DIET
        _, side, count = next((entry for entry in diet if progress < entry[0]), diet[-1])
        pixels, latents, kl = self.examples(count, side)
        decoded = self.model.decode(latents)
        plain = (decoded - pixels).abs().mean()
        colour = (chroma(decoded) - chroma(pixels)).abs().mean()
        distance = self.perceptual(decoded, pixels).mean()
        loss = plain + CHROMA_WEIGHT * colour + PERCEPTUAL_WEIGHT * distance
        mse = F.mse_loss(decoded.detach().clamp(-1, 1), pixels)
        figures = {"psnr": float(10 * torch.log10(4 / mse)), "l1": float(plain.detach())}
        figures["perceptual"] = float(distance.detach())
        (wanted,) = torch.autograd.grad(loss, decoded, retain_graph=True)
        where = eventful(pixels)
        if progress >= ADVERSARIAL_FROM:
            verdict = judge(self.critic, decoded, where, wanted, self.model.decoder.conv_out.weight)
            wanted = wanted + verdict.gradient
            figures["ratio"] = verdict.ratio
        figures["critic"] = self._teach_critic(pixels, decoded, where)
        self.optimizer.zero_grad(set_to_none=True)
        if kl is None:
            torch.autograd.backward([decoded], [wanted])
        else:
            torch.autograd.backward([decoded, KL_WEIGHT * kl], [wanted, torch.ones_like(kl)])
            figures["kl"] = float(kl.detach())
        parallel.average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return figures

    def _teach_critic(self, pixels: Tensor, decoded: Tensor, where: Tensor) -> float:
        loss = critic_loss(self.critic, pixels, decoded, where)
        self.critic_optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        parallel.average_gradients(self.critic)
        self.critic_optimizer.step()
        return float(loss.detach())


def train(work: Path, minutes: float, processes: int | None = None) -> Path:
    """Train for `minutes` of each core in all, going on from the checkpoint in `work`; returns its path."""
    icons.load_sprites(work / "npm")  # rendered once here, before several processes want them
    parallel.launch(_work, work, minutes, processes=processes)
    return work / CHECKPOINT


def _work(rank: int, work: Path, minutes: float) -> None:
    """One process's share of the training; the first one also keeps the average, checkpoints and sheets."""
    torch.manual_seed(0)
    frozen = load_file(work / START) if (work / START).is_file() else None
    stage = Stage(Pictures(work, np.random.default_rng([1, 0, rank])), frozen)
    clock, curve, step = Clock(), Curve(work / "autoencoder.jsonl"), 0
    checkpoint = load_checkpoint(work / CHECKPOINT)
    if checkpoint is not None:
        for name, part in stage.parts.items():
            part.load_state_dict(checkpoint[name])
        stage.average.load(checkpoint["average"])
        clock, step = Clock(checkpoint["elapsed"], checkpoint["wall"]), checkpoint["step"]
    stage.pictures.rng = np.random.default_rng([1, step, rank])
    torch.manual_seed(1000 * step + rank)  # the posterior's noise differs between processes

    def save() -> None:
        states = {name: part.state_dict() for name, part in stage.parts.items()}
        times = {"elapsed": clock.elapsed, "wall": clock.wall, "step": step, "processes": parallel.world_size()}
        save_checkpoint(work / CHECKPOINT, {**states, "average": stage.average.state(), **times})

    budget, saved, shown = minutes * 60, clock.wall, clock.wall
    while clock.elapsed < budget:
        set_learning_rate(stage.optimizer, learning_rate(clock.elapsed / budget, stage.peak))
        figures = stage.step(clock.elapsed / budget)
        step += 1
        clock.tick()
        if rank > 0:
            continue
        stage.average.update(stage.model)
        curve.add(figures)
        if step % REPORT_STEPS == 0:
            line = curve.write(step, clock)
            print(f"autoencoder {clock.elapsed / 60:5.1f}/{minutes:g} min step {step} {line}", flush=True)
        if clock.wall - saved > CHECKPOINT_SECONDS:
            save()
            saved = clock.wall
        if clock.wall - shown > SHEET_SECONDS:
            _sheet(stage, work, work / "sheets" / f"autoencoder-{int(clock.elapsed):05d}.png")
            shown = clock.wall
    if rank == 0:
        save()


@torch.no_grad()
def _sheet(stage: Stage, work: Path, path: Path) -> None:
    """Originals above their reconstructions by the averaged weights, the same ones every time."""
    model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE)).to(device()).eval()
    model.load_state_dict(stage.average.values)
    pixels = Pictures(work, np.random.default_rng(2), held_out=True).whole(12).to(device())
    contact_sheet(to_pictures(pixels) + to_pictures(model.decode(model.encode(pixels).mean)), path, columns=12)
