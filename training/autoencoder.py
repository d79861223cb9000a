"""First stage: a KL-regularised autoencoder (arXiv:2112.10752, section 3.1) learned from rendered pictures.

Loss: L1, an L1 on chroma (hue is a small part of plain L1 and was learned last without it), the perceptual distance,
a patch critic with the paper's adaptive weight, a light KL. With `frozen` only the decoder learns: the latents, and
all that was ever trained on them, stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from training.muon import Muon
from training.perceptual import Perceptual
from training.pictures import CROPS_PER_PICTURE, Pictures

CHECKPOINT = "autoencoder.pt"
START = "start.safetensors"  # a finished first stage, folded; where it lies in the work folder, only its decoder learns
PEAK_RATE, CRITIC_RATE = 1e-3, 4e-4
# Of the budget: the critic learns from the start, is first listened to when the rest has settled, and in full when what
# it says is no longer news. All at once, it doubled the perceptual distance and took two decibels.
ADVERSARIAL_FROM, ADVERSARIAL_FULL = 0.4, 0.6
# (until this part of the budget, side of the square seen, squares per process and step): colour and coarse form need
# many steps rather than many pixels, so the first steps see small crops. Norms look at all of what they are given, so
# that most of the budget belongs to whole pictures: a decoder used to one loses six decibels on the other.
DIET = ((0.1, 64, 16), (0.35, 128, 4), (1.0, scenes.IMAGE_SIZE, 1))
FROZEN_DIET = ((1.0, scenes.IMAGE_SIZE, 2),)
GPU_SQUARES = 16  # times as many on a GPU, which takes hardly longer for them
CHROMA_WEIGHT, PERCEPTUAL_WEIGHT, KL_WEIGHT = 1.0, 0.1, 6e-3  # the first two and L1 weigh about the same
EXTRA_NOISE = 0.15  # of a frozen stage's latents, at most: the second stage's latents are not exact either
WINDOW = 128  # side of the square that perceptual distance and critic see of a whole picture: they cost as much as it
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


def windows(pixels: Tensor, side: int) -> list[tuple[int, int]]:
    """For each picture `(n, 3, h, w)`, the top left corner of a square of `side` pixels around something that is there.

    The whole picture where it is no larger.
    """
    height, width = pixels.shape[2:]
    patches = eventful(pixels)[:, 0]
    picked = torch.multinomial(patches.flatten(1).cpu() + 1e-6, 1)[:, 0].tolist()

    def start(patch: int, count: int, length: int) -> int:
        return max(min((2 * patch + 1) * length // (2 * count) - side // 2, length - side), 0)

    rows, columns = patches.shape[1:]
    return [(start(at // columns, rows, height), start(at % columns, columns, width)) for at in picked]


def cut(pictures: Tensor, corners: Sequence[tuple[int, int]], side: int) -> Tensor:
    """The square of `side` pixels at each picture's own corner (y, x): (n, c, side, side)."""
    squares = [picture[:, y : y + side, x : x + side] for picture, (y, x) in zip(pictures, corners, strict=True)]
    return torch.stack(squares).contiguous(memory_format=torch.channels_last)


class Stage:
    """What learns, and one step of it."""

    def __init__(self, pictures: Pictures, frozen: dict[str, Tensor] | None) -> None:
        self.pictures = pictures
        self.frozen = frozen is not None
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
        self.optimizer = Muon(self.model, lr=PEAK_RATE, weight_decay=1e-4)
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
        pixels = self.pictures.whole(count if whole else max(count // CROPS_PER_PICTURE, 1))
        corners = [(0, 0)] * count if whole else self.pictures.corners(count, side)
        source = [index % len(pixels) for index in range(count)]
        squares = cut(pixels[source], corners, side)
        if not self.frozen:
            posterior = self.model.encode(squares)
            return squares, posterior.sample(), posterior.kl().mean() / posterior.mean[0].numel()
        # The encoder sees whole pictures, as ever: its norms look at all of what they are given.
        with torch.no_grad():
            latents = self.model.encode(pixels).mean
        factor = architecture.FACTOR
        cells = cut(latents[source], [(y // factor, x // factor) for y, x in corners], side // factor)
        strength = torch.rand(count, 1, 1, 1, device=cells.device) * EXTRA_NOISE
        return squares, cells + strength * torch.randn_like(cells), None

    def step(self, progress: float) -> dict[str, float]:
        """One update of what learns and one of the critic; figures for the progress line."""
        diet = FROZEN_DIET if self.frozen else DIET
        _, side, count = next((entry for entry in diet if progress < entry[0]), diet[-1])
        pixels, latents, kl = self.examples(count * GPU_SQUARES if device().type == "cuda" else count, side)
        decoded = self.model.decode(latents)
        plain = (decoded - pixels).abs().mean()
        colour = (chroma(decoded) - chroma(pixels)).abs().mean()
        corners = windows(pixels, WINDOW)
        seen, true = cut(decoded, corners, WINDOW), cut(pixels, corners, WINDOW)
        distance = self.perceptual(seen, true).mean()
        loss = plain + CHROMA_WEIGHT * colour + PERCEPTUAL_WEIGHT * distance
        mse = F.mse_loss(decoded.detach().clamp(-1, 1), pixels)
        figures = {"psnr": float(10 * torch.log10(4 / mse)), "l1": float(plain.detach())}
        figures["perceptual"] = float(distance.detach())
        (wanted,) = torch.autograd.grad(loss, decoded, retain_graph=True)
        outputs, gradients = [decoded], [wanted]
        where = eventful(true)
        if progress >= ADVERSARIAL_FROM:
            verdict = judge(self.critic, seen, where, self.model.decoder.conv_out.weight, decoded, wanted)
            loudness = min((progress - ADVERSARIAL_FROM) / (ADVERSARIAL_FULL - ADVERSARIAL_FROM), 1.0)
            outputs, gradients = [*outputs, seen], [*gradients, loudness * verdict.gradient]
            figures["ratio"] = verdict.ratio
        figures["critic"] = self._teach_critic(true, seen, where)
        if kl is not None:
            outputs, gradients = [*outputs, KL_WEIGHT * kl], [*gradients, torch.ones_like(kl)]
            figures["kl"] = float(kl.detach())
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(outputs, gradients)
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
    checkpoint = load_checkpoint(work / CHECKPOINT)
    clock, curve, step = Clock(), Curve(work / "autoencoder.jsonl"), checkpoint["step"] if checkpoint else 0
    pictures = Pictures(work, np.random.default_rng(0))
    pictures.start_over([1, step, rank])  # its processes are forked before this one starts a GPU's driver
    stage = Stage(pictures, frozen)
    if checkpoint is not None:
        for name, part in stage.parts.items():
            part.load_state_dict(checkpoint[name])
        stage.average.load(checkpoint["average"])
        clock = Clock(checkpoint["elapsed"], checkpoint["wall"])
    torch.manual_seed(1000 * step + rank)  # the posterior's noise differs between processes

    def save() -> None:
        states = {name: part.state_dict() for name, part in stage.parts.items()}
        times = {"elapsed": clock.elapsed, "wall": clock.wall, "step": step, "processes": parallel.world_size()}
        save_checkpoint(work / CHECKPOINT, {**states, "average": stage.average.state(), **times})

    budget, saved, shown = minutes * 60, clock.wall, clock.wall
    while clock.elapsed < budget:
        set_learning_rate(stage.optimizer, learning_rate(clock.elapsed / budget, PEAK_RATE))
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
    pixels = Pictures(work, np.random.default_rng(2), held_out=True).whole(12)
    contact_sheet(to_pictures(pixels) + to_pictures(model.decode(model.encode(pixels).mean)), path, columns=12)
