"""Second stage: a text-conditioned U-Net learned on the latents, jointly with its text encoder.

Velocity prediction (arXiv:2202.00512, appendix D), stratified timesteps, 10 % empty captions for classifier-free
guidance (arXiv:2207.12598), an average of the weights for sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.unet import UNet
from latentmill.engine.sampling.denoiser import Denoiser
from latentmill.engine.sampling.levels import PLACEMENTS
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.solvers import ddim, solve
from training import architecture, icons, latents, pairs, parallel, scenes, tokenizer
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
from training.devices import device, mixed_precision, place
from training.drawing import GUIDANCE, STEPS
from training.muon import Muon

CHECKPOINT = "diffusion.pt"
PEAK_RATE = 7e-4
PICTURES, NOISES = 16, 2  # per process and step; each picture is seen at two timesteps, its caption encoded once
GPU_PICTURES = 128  # a GPU is no faster with fewer
SHARES = {"scenes": 0.6, "pairs": 0.2, "icons": 0.2}  # of each batch
CAPTION_DROPOUT = 0.1
# Most timesteps come from where edges are settled: true latents noised to t = 350 and sampled from there came back
# nearly as wavy as those from t = 850 (boundary F-score 0.85 and 0.83), those from t = 100 nearly true (0.97).
TIMESTEP_EDGES, TIMESTEP_SHARES = (0.0, 0.1, 0.5, 1.0), (0.0, 0.12, 0.75, 1.0)
CHECKPOINT_SECONDS, SHEET_SECONDS, REPORT_STEPS = 120.0, 600.0, 25


def text_config() -> CLIPTextConfig:
    """The text encoder's config, with the special tokens where our tokenizer has them."""
    return CLIPTextConfig(**architecture.TEXT_ENCODER)


class Model(nn.Module):
    """The two networks that learn together: (noisy latents, timesteps, token ids) -> velocity."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = text_config()
        config.vocab_size = vocabulary
        config.bos_token_id, config.eos_token_id, config.pad_token_id = vocabulary - 2, vocabulary - 1, vocabulary - 1
        self.text_encoder = CLIPTextModel(config)
        self.unet = UNet(UNetConfig.from_dict(architecture.UNET))

    def context(self, ids: Tensor) -> Tensor:
        """(n, length) token ids -> (n, length, width)."""
        return self.text_encoder(ids).last_hidden_state

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """`ids` has one row per picture, `noisy` has `NOISES` rows per picture, neighbours of one another."""
        context = self.context(ids).repeat_interleave(len(noisy) // len(ids), dim=0)
        return self.unet(noisy, timesteps, context)


@dataclass(kw_only=True)
class Data:
    """Encoded pictures with their captions, kind after kind."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor
    counts: Mapping[str, int]

    @classmethod
    def load(cls, work: Path) -> Data:
        stored = load_checkpoint(work / latents.CHECKPOINT)
        if stored is None:
            raise RuntimeError(f"{work / latents.CHECKPOINT} is not there: run `--stage latents` first")
        empty = tokenizer.encode(tokenizer.load(work / "tokenizer"), [""])[0]
        held = {"latents": stored["latents"], "tokens": stored["tokens"], "empty": empty}
        return cls(**{name: tensor.to(device()) for name, tensor in held.items()}, counts=stored["counts"])

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` random pictures: latents (count, c, h, w) and token ids (count, length), some of them empty."""
        where = generator.device
        shares = torch.tensor([SHARES[kind] for kind in self.counts], device=where)
        numbers = torch.tensor(list(self.counts.values()), device=where)
        kind = torch.multinomial(shares, count, replacement=True, generator=generator)
        place = (torch.rand(count, generator=generator, device=where) * numbers[kind]).long()
        pick = (numbers.cumsum(0) - numbers)[kind] + place
        form = torch.randint(self.tokens.shape[1], (count,), generator=generator, device=where)
        dropped = torch.rand(count, 1, generator=generator, device=where) < CAPTION_DROPOUT
        ids = torch.where(dropped, self.empty, self.tokens[pick, form])
        return self.latents[pick].float(), ids.long()


def stratified_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps, one from each equally likely part of the schedule, in random order: (count,) int64."""
    where = generator.device
    strata = torch.randperm(count, generator=generator, device=where)
    place = (strata + torch.rand(count, generator=generator, device=where)) / count
    shares, edges = (torch.tensor(values, device=where) for values in (TIMESTEP_SHARES, TIMESTEP_EDGES))
    part = torch.searchsorted(shares, place, right=True).clamp(max=len(shares) - 1) - 1
    within = (place - shares[part]) / (shares[part + 1] - shares[part])
    times = torch.lerp(edges[part], edges[part + 1], within) * total
    return times.long().clamp(max=total - 1)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One batch: what the model is shown, as `Model.forward` takes it, and the velocity that it must tell."""

    noisy: Tensor
    timesteps: Tensor
    ids: Tensor
    velocity: Tensor

    @classmethod
    def draw(cls, schedule: NoiseSchedule, data: Data, generator: torch.Generator) -> Lesson:
        """At random, on the generator's device."""
        where = generator.device
        clean, ids = data.batch(GPU_PICTURES if where.type == "cuda" else PICTURES, generator)
        clean = clean.repeat_interleave(NOISES, dim=0)
        timesteps = stratified_timesteps(len(clean), schedule.config.num_train_timesteps, generator)
        noise = torch.randn(clean.shape, generator=generator, device=where)
        alpha_bar = schedule.alphas_cumprod.to(where)[timesteps].reshape(-1, 1, 1, 1)
        signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return cls(
            noisy=schedule.add_noise(clean, noise, timesteps),
            timesteps=timesteps,
            ids=ids,
            velocity=signal * noise - spread * clean,
        )

    @property
    def shown(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.noisy, self.timesteps, self.ids

    def loss(self, predict: Callable[..., Tensor]) -> Tensor:
        """Mean squared error of the velocity."""
        with mixed_precision():
            predicted = predict(*self.shown)
        return F.mse_loss(predicted.float(), self.velocity)


def train(
    work: Path,
    minutes: float,
    warm_start: dict[str, Tensor] | None = None,
    limit_minutes: float = math.inf,
    processes: int | None = None,
) -> Path:
    """Train for `minutes` of each core in all, going on from the checkpoint in `work`; returns the checkpoint's path.

    This call ends after `limit_minutes`, with a checkpoint from which the next one goes on.
    """
    parallel.launch(_work, work, minutes, warm_start, limit_minutes, processes=processes)
    return work / CHECKPOINT


def _work(
    rank: int, work: Path, minutes: float, warm_start: dict[str, Tensor] | None, limit_minutes: float = math.inf
) -> None:
    """One process's share of the training; the first one also keeps the average, checkpoints and sheets."""
    torch.manual_seed(0)
    data = Data.load(work)
    schedule = NoiseSchedule(SchedulerConfig.from_dict(architecture.SCHEDULER))
    model = Model(len(tokenizer.load(work / "tokenizer")))
    if warm_start is not None:
        model.load_state_dict(warm_start)
    place(model)
    optimizer = Muon(model, lr=PEAK_RATE, weight_decay=1e-3)
    average = RunningAverage(model, 0.998)
    clock, curve, step = Clock(), Curve(work / "diffusion.jsonl"), 0
    checkpoint = load_checkpoint(work / CHECKPOINT)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        average.load(checkpoint["average"])
        clock, step = Clock(checkpoint["elapsed"], checkpoint["wall"]), checkpoint["step"]
    generator = torch.Generator(device()).manual_seed(1000 * step + rank)
    predict = _as_graph(model, Lesson.draw(schedule, data, generator))

    def save() -> None:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state()}
        times = {"elapsed": clock.elapsed, "wall": clock.wall, "step": step, "processes": parallel.world_size()}
        save_checkpoint(work / CHECKPOINT, {**states, **times})

    budget, saved, shown = minutes * 60, clock.wall, clock.wall
    limit = min(budget, clock.elapsed + 60 * limit_minutes)
    while clock.elapsed < limit:
        set_learning_rate(optimizer, learning_rate(clock.elapsed / budget, PEAK_RATE))
        loss = Lesson.draw(schedule, data, generator).loss(predict)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        parallel.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        clock.tick()
        if rank > 0:
            continue
        average.update(model)
        curve.add({"loss": loss.detach()})
        if step % REPORT_STEPS == 0:
            line = curve.write(step, clock)
            print(f"diffusion {clock.elapsed / 60:5.1f}/{minutes:g} min step {step} {line}", flush=True)
        if clock.wall - saved > CHECKPOINT_SECONDS:
            save()
            saved = clock.wall
        if clock.wall - shown > SHEET_SECONDS:
            _sheet(average, work, schedule, work / "sheets" / f"diffusion-{int(clock.elapsed):05d}.png")
            shown = clock.wall
    if rank == 0:
        save()


def _as_graph(model: Model, lesson: Lesson) -> Callable[..., Tensor]:
    """The model, on a GPU as one graph: there, starting its kernels one by one takes longer than they do."""
    if device().type != "cuda":
        return model
    cuda: Any = torch.cuda  # its types name a union that fits no caller
    graph: Callable[..., Tensor] = cuda.make_graphed_callables(model, lesson.shown)
    return graph


def _sheet_captions() -> list[str]:
    """What the sheets show: held-out scenes and pairs, then icons; the same every time."""
    held_out = scenes.split(held_out=True)
    texts = [scenes.caption(scene) for scene in held_out[:: len(held_out) // 8][:8]]
    texts += [pairs.caption(pair) for pair in pairs.draw_pairs(8, np.random.default_rng(3), held_out=True)]
    names = list(icons.NAMES)[:: len(icons.NAMES) // 8][:8]
    styles = [icons.STYLES[index % len(icons.STYLES)] for index in range(len(names))]
    return texts + [
        icons.caption(icons.Icon(name=name, style=style, background="white"))
        for name, style in zip(names, styles, strict=True)
    ]


@torch.inference_mode()
def _sheet(average: RunningAverage, work: Path, schedule: NoiseSchedule, path: Path) -> None:
    """24 pictures by the averaged weights."""
    words = tokenizer.load(work / "tokenizer")
    model = Model(len(words)).to(device()).eval()
    model.load_state_dict(average.values)
    first_stage = AutoencoderKL(VAEConfig.from_dict(architecture.VAE)).to(device()).eval()
    first_stage.load_state_dict(latents.first_stage(work))
    texts = _sheet_captions()
    ids = tokenizer.encode(words, [""] * len(texts) + texts).to(device())
    guidance = torch.full((len(texts), 1, 1, 1), GUIDANCE, device=device())
    denoiser = Denoiser(model.unet, schedule, model.context(ids), guidance)
    generator = torch.Generator().manual_seed(5)
    size = architecture.UNET["sample_size"]
    shape = (len(texts), architecture.LATENT_CHANNELS, size, size)
    noise = torch.randn(shape, generator=generator).to(device())
    found = solve(ddim(noise, PLACEMENTS["strides"].place(schedule, STEPS)), denoiser)
    contact_sheet(to_pictures(first_stage.decode(found)), path)
