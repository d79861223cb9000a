"""How much of a picture the first stage keeps: `python -m training.reconstruction --work FOLDER`.

Held-out scenes and icons through the encoder and back, by the shipped weights and by those that `--work` has reached:
PSNR, the perceptual distance, how many edge pixels stay within one pixel, how wide edges become.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from training import architecture, edges, judge, latents
from training.common import DEFAULT_WORK, contact_sheet, to_pictures, to_tensor
from training.devices import device
from training.export import EMBEDDED, WEIGHTS
from training.perceptual import Perceptual
from training.pictures import Pictures
from training.scenes import Pixels

COUNT = 32  # pictures of each kind
TOLERANCE = 1.0  # pixels
BATCH = 8


def shipped(model: Path) -> dict[str, Tensor]:
    """The first stage of a model folder."""
    return {name: value.float() for name, value in load_file(model / "vae" / WEIGHTS).items()}


@torch.inference_mode()
def measure(state: Mapping[str, Tensor], work: Path, sheet: Path | None = None) -> dict[str, float]:
    """Figures of the first stage with the weights `state`; `sheet` gets originals above what came back."""
    model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE)).to(device()).eval()
    model.load_state_dict(state)
    perceptual = Perceptual().to(device())
    pictures = Pictures(work, np.random.default_rng(21), held_out=True)
    figures: dict[str, float] = {}
    shown = []
    for kind in ("scene", "pair", "icon"):
        originals = [pictures.draw(kind) for _ in range(COUNT)]
        true = to_tensor(originals)
        parts = [model.decode(model.encode(part.to(device())).mean).cpu() for part in torch.split(true, BATCH)]
        back = torch.cat(parts).clamp(-1, 1)
        figures[f"{kind}s, PSNR in dB"] = float(10 * torch.log10(4 / F.mse_loss(back, true)))
        both = zip(torch.split(back.to(device()), BATCH), torch.split(true.to(device()), BATCH), strict=True)
        distances = [perceptual(one, other) for one, other in both]
        figures[f"{kind}s, perceptual distance"] = float(torch.cat(distances).mean())
        returned = to_pictures(back)
        shown += originals[:8] + returned[:8]
        if kind == "scene":
            figures["scenes, edge F-score at 1 px"] = float(
                np.mean([_edge_score(*two) for two in zip(returned, originals, strict=True)])
            )
            figures["scenes, edge width in px"] = float(np.nanmean([edges.width(picture) for picture in returned]))
    if sheet is not None:
        contact_sheet(shown, sheet, cell=256)
    return figures


def _edge_score(returned: Pixels, original: Pixels) -> float:
    seen, true = (judge.find_object(judge.to_lab(picture)) for picture in (returned, original))
    return 0.0 if seen is None or true is None else edges.f_score(seen, true, TOLERANCE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.reconstruction", description="Measure the first stage.")
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    options = parser.parse_args()
    found = {"shipped": measure(shipped(options.model), options.work, options.work / "sheets" / "shipped.png")}
    if (options.work / latents.AUTOENCODER).is_file() or (options.work / "autoencoder.pt").is_file():
        sheet = options.work / "sheets" / "reconstruction.png"
        found["work"] = measure(latents.first_stage(options.work), options.work, sheet)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
