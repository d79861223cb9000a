"""Between the stages: every training picture encoded once, with the captions it may be shown under.

The latents' mean and deviation per channel are folded into the autoencoder's 1x1 convolutions, so that the shipped
model has latents of zero mean and unit deviation and the scaling factor 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from training import architecture, icons, parallel, scenes, tokenizer
from training.common import device, load_checkpoint, save_checkpoint, to_tensor

CHECKPOINT = "latents.pt"
AUTOENCODER = "vae.safetensors"
CAPTIONS_PER_PICTURE = 6
BATCH = 8
REPORT_EVERY = 50  # batches


def _pictures(scene_count: int, icon_count: int) -> tuple[list[scenes.Scene], list[icons.Icon]]:
    rng = np.random.default_rng(11)
    drawn = scenes.draw_scenes(scenes.split(held_out=False), scene_count, rng)
    return drawn, icons.draw_icons(list(icons.NAMES), icon_count, rng)


def encode(work: Path, scene_count: int, icon_count: int) -> Path:
    """Encode the data set with the first stage's averaged weights; writes latents and folded autoencoder to `work`."""
    if (work / CHECKPOINT).is_file():
        return work / CHECKPOINT
    finished = (work / AUTOENCODER).is_file()  # a first stage that is not to change: it is folded already
    processes = 1 if device().type == "cuda" else None
    parallel.launch(_work, work, scene_count, icon_count, processes=processes)
    parts = [load_checkpoint(path) for path in sorted(work.glob("latents-part-*.pt"))]
    found = [part for part in parts if part is not None]
    latents = torch.cat([part["latents"] for part in found]).float()
    order = torch.cat([part["index"] for part in found]).argsort()
    latents = latents[order]
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    print(f"latents: {len(latents)} pictures, mean {mean.tolist()}, deviation {deviation.tolist()}", flush=True)
    if not finished:
        latents = (latents - mean[:, None, None]) / deviation[:, None, None]
        save_file(fold(_first_stage(work), mean, deviation), work / AUTOENCODER)
    drawn, pictograms = _pictures(scene_count, icon_count)
    tokens = _tokens(work, drawn, pictograms)
    save_checkpoint(work / CHECKPOINT, {"latents": latents.half(), "tokens": tokens, "scenes": len(drawn)})
    for path in work.glob("latents-part-*.pt"):
        path.unlink()
    return work / CHECKPOINT


def _first_stage(work: Path) -> dict[str, Tensor]:
    if (work / AUTOENCODER).is_file():
        return folded_autoencoder(work)
    checkpoint = load_checkpoint(work / "autoencoder.pt")
    if checkpoint is None:
        raise RuntimeError(f"{work / 'autoencoder.pt'} is not there: run `--stage autoencoder` first")
    values: dict[str, Tensor] = checkpoint["average"]["values"]
    return values


@torch.inference_mode()
def _work(rank: int, work: Path, scene_count: int, icon_count: int) -> None:
    """One process's share of the pictures, written as one part."""
    count = parallel.world_size()
    model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE))
    model.load_state_dict(_first_stage(work))
    model.to(device()).eval()
    sprites = icons.load_sprites(work / "npm")
    drawn, pictograms = _pictures(scene_count, icon_count)
    mine = list(range(rank, scene_count + icon_count, count))
    found = []
    for start in range(0, len(mine), BATCH):
        pictures = []
        for index in mine[start : start + BATCH]:
            rng = np.random.default_rng([12, index])
            if index < scene_count:
                pictures.append(scenes.render(drawn[index], rng))
            else:
                pictures.append(icons.render(pictograms[index - scene_count], sprites, rng))
        found.append(model.encode(to_tensor(pictures).to(device())).mean.half().cpu())
        if rank == 0 and start // BATCH % REPORT_EVERY == 0:
            print(f"latents {start}/{len(mine)} in the first of {count} processes", flush=True)
    save_checkpoint(work / f"latents-part-{rank}.pt", {"latents": torch.cat(found), "index": torch.tensor(mine)})


def _tokens(work: Path, drawn: list[scenes.Scene], pictograms: list[icons.Icon]) -> Tensor:
    """Token ids of several captions per picture: (n, captions, length) int16."""
    rng = np.random.default_rng(13)
    texts = [scenes.caption(scene, rng) for scene in drawn for _ in range(CAPTIONS_PER_PICTURE)]
    texts += [icons.caption(icon, rng) for icon in pictograms for _ in range(CAPTIONS_PER_PICTURE)]
    ids = tokenizer.encode(tokenizer.load(work / "tokenizer"), texts)
    return ids.to(torch.int16).reshape(-1, CAPTIONS_PER_PICTURE, architecture.MODEL_MAX_LENGTH)


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
    return state


def folded_autoencoder(work: Path) -> dict[str, Tensor]:
    """The autoencoder that `encode` wrote."""
    return load_file(work / AUTOENCODER)
