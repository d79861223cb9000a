"""Between the stages: every training picture encoded once, with the captions it may be shown under.

The latents' mean and deviation per channel are folded into the autoencoder's 1x1 convolutions, so that the shipped
model has latents of zero mean and unit deviation and the scaling factor 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from training import architecture, autoencoder, icons, pairs, parallel, scenes, tokenizer
from training.common import load_checkpoint, save_checkpoint, to_tensor
from training.devices import device, drawn_by_others, place
from training.icons import Sprite
from training.scenes import Pixels

CHECKPOINT = "latents.pt"
AUTOENCODER = "vae.safetensors"
COUNTS = {"scenes": 9_000, "pairs": 6_000, "icons": 5_000}
"""Pictures of each kind that the recipe encodes."""
CAPTIONS_PER_PICTURE = 6
BATCH, GPU_BATCH = 8, 64
REPORT_EVERY = 400  # pictures


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is to be encoded, in this order."""

    scenes: list[scenes.Scene]
    pairs: list[pairs.Pair]
    icons: list[icons.Icon]

    @classmethod
    def draw(cls, counts: Mapping[str, int]) -> Pictures:
        """So many of each kind, the same ones on every call."""
        rng = np.random.default_rng(11)
        return cls(
            scenes=scenes.draw_scenes(scenes.split(held_out=False), counts["scenes"], rng),
            pairs=pairs.draw_pairs(counts["pairs"], rng, held_out=False),
            icons=icons.draw_icons(list(icons.NAMES), counts["icons"], rng),
        )

    def render(self, index: int, sprites: Mapping[tuple[str, str], Sprite]) -> Pixels:
        """The picture at `index`, the same on every call."""
        rng = np.random.default_rng([12, index])
        if index < len(self.scenes):
            return scenes.render(self.scenes[index], rng)
        index -= len(self.scenes)
        if index < len(self.pairs):
            return pairs.render(self.pairs[index], rng)
        return icons.render(self.icons[index - len(self.pairs)], sprites, rng)

    def captions(self) -> list[str]:
        """`CAPTIONS_PER_PICTURE` captions of each picture, one after the other."""
        rng = np.random.default_rng(13)
        times = range(CAPTIONS_PER_PICTURE)
        texts = [scenes.caption(scene, rng) for scene in self.scenes for _ in times]
        texts += [pairs.caption(pair, rng) for pair in self.pairs for _ in times]
        return texts + [icons.caption(icon, rng) for icon in self.icons for _ in times]


class Rendered(Dataset[Pixels]):
    """Some of the pictures."""

    def __init__(self, drawn: Pictures, indices: Sequence[int], sprites: Mapping[tuple[str, str], Sprite]) -> None:
        self.drawn, self.indices, self.sprites = drawn, indices, sprites

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Pixels:
        return self.drawn.render(self.indices[place], self.sprites)


def encode(work: Path, counts: Mapping[str, int], processes: int | None = None) -> Path:
    """Encode the data set with the first stage's averaged weights; writes the latents to `work`.

    A first stage from nothing is folded and written as well; one that was finished before is folded already.
    """
    if (work / CHECKPOINT).is_file():
        return work / CHECKPOINT
    finished = (work / autoencoder.START).is_file()
    if device().type == "cuda":
        processes = 1
    icons.load_sprites(work / "npm")
    _remove_parts(work)  # of a call that was stopped, and may have had more processes
    parallel.launch(_work, work, dict(counts), processes=processes)
    parts = [load_checkpoint(path) for path in sorted(work.glob("latents-part-*.pt"))]
    found = [part for part in parts if part is not None]
    latents = torch.cat([part["latents"] for part in found]).float()
    order = torch.cat([part["index"] for part in found]).argsort()
    latents = latents[order]
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    print(f"latents: {len(latents)} pictures, mean {mean.tolist()}, deviation {deviation.tolist()}", flush=True)
    if not finished:
        latents = (latents - mean[:, None, None]) / deviation[:, None, None]
        save_file(fold(_learned(work), mean, deviation), work / AUTOENCODER)
    texts = Pictures.draw(counts).captions()
    tokens = tokenizer.encode(tokenizer.load(work / "tokenizer"), texts).to(torch.int16)
    tokens = tokens.reshape(-1, CAPTIONS_PER_PICTURE, architecture.MODEL_MAX_LENGTH)
    counted = {kind: counts[kind] for kind in COUNTS}
    save_checkpoint(work / CHECKPOINT, {"latents": latents.half(), "tokens": tokens, "counts": counted})
    _remove_parts(work)
    return work / CHECKPOINT


def _remove_parts(work: Path) -> None:
    for path in work.glob("latents-part-*.pt"):
        path.unlink()


def _learned(work: Path) -> dict[str, Tensor]:
    """The averaged weights that the first stage has reached."""
    checkpoint = load_checkpoint(work / autoencoder.CHECKPOINT)
    if checkpoint is None:
        raise RuntimeError(f"{work / autoencoder.CHECKPOINT} is not there: run `--stage autoencoder` first")
    values: dict[str, Tensor] = checkpoint["average"]["values"]
    return values


def first_stage(work: Path) -> dict[str, Tensor]:
    """The first stage that belongs to the latents of `work`: folded, and the best that there is."""
    start = work / autoencoder.START
    if not start.is_file():
        return load_file(work / AUTOENCODER)
    return _learned(work) if (work / autoencoder.CHECKPOINT).is_file() else load_file(start)


@torch.inference_mode()
def _work(rank: int, work: Path, counts: Mapping[str, int]) -> None:
    """One process's share of the pictures, written as one part."""
    count = parallel.world_size()
    mine = list(range(rank, sum(counts[kind] for kind in COUNTS), count))
    rendered = Rendered(Pictures.draw(counts), mine, icons.load_sprites(work / "npm"))
    size = GPU_BATCH if device().type == "cuda" else BATCH
    batches = drawn_by_others(rendered, size)
    model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE))
    start = work / autoencoder.START
    model.load_state_dict(load_file(start) if start.is_file() else _learned(work))
    place(model.eval())
    found: list[Tensor] = []
    for pictures in batches:
        if rank == 0 and len(found) * size % REPORT_EVERY < size:
            print(f"latents {len(found) * size}/{len(mine)} in the first of {count} processes", flush=True)
        found.append(model.encode(to_tensor(pictures.to(device()))).mean.half().cpu())
    save_checkpoint(work / f"latents-part-{rank}.pt", {"latents": torch.cat(found), "index": torch.tensor(mine)})


def fold(state: dict[str, Tensor], mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """The autoencoder whose latents are those of `state` less `mean (c,)`, divided by `deviation (c,)`."""
    state = {name: value.float().clone() for name, value in state.items()}
    channels = len(mean)
    weight, bias = state["quant_conv.weight"], state["quant_conv.bias"]
    weight[:channels] /= deviation.reshape(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / deviation
    bias[channels:] -= 2 * deviation.log()
    after = state["post_quant_conv.weight"]
    state["post_quant_conv.bias"] += after[:, :, 0, 0] @ mean
    after *= deviation.reshape(1, -1, 1, 1)
    return {name: value.contiguous() for name, value in state.items()}  # the training has them with channels last
