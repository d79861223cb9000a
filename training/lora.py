"""LoRAs of one colour style each for the embedded model: `python -m training.lora`, a few minutes on one core.

Attention and the last convolutions get terms of low rank (arXiv:2106.09685), all else stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latentmill.engine.latent_diffusion import LatentDiffusion
from training.styles import DYES, Lessons, velocity_loss

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "loras"

RANK = 4
LAYERS = (".attn", "up_blocks.2.resnets", "conv_out")
RATE = 4e-3
BATCH = 8


class LowRankDelta(nn.Module):
    """A weight `(o, i, ...)` plus `up (o, r)` times `down (r, i, ...)`; `up` begins at zero: nothing changes yet."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down.flatten(1)).reshape(weight.shape)


def train(model: LatentDiffusion, latents: Tensor, contexts: Tensor, empty: Tensor, steps: int) -> dict[str, Tensor]:
    """The terms that are learned, by the keys that diffusers gives them."""
    torch.manual_seed(0)
    unet = model.denoiser
    deltas: dict[str, LowRankDelta] = {}
    for path, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and any(part in path for part in LAYERS):
            deltas[path] = LowRankDelta(module.weight)
            parametrize.register_parametrization(module, "weight", deltas[path])
    optimizer = torch.optim.AdamW([p for delta in deltas.values() for p in delta.parameters()], lr=RATE)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 2 * (1 - step / steps))
        loss = velocity_loss(unet, model.schedule, latents, contexts, empty, BATCH, generator)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss={sum(losses[-50:]) / 50:.4f}", flush=True)
    tensors: dict[str, Tensor] = {}
    for path, delta in deltas.items():
        up = delta.up if delta.down.dim() == 2 else delta.up[:, :, None, None]
        tensors |= {f"unet.{path}.lora_A.weight": delta.down, f"unet.{path}.lora_B.weight": up}
        parametrize.remove_parametrizations(unet.get_submodule(path), "weight", leave_parametrized=False)
    return {key: tensor.detach().half().contiguous() for key, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.lora", description="Train the LoRAs that ship.")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    lessons = Lessons.prepare()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, style in DYES.items():
        tensors = train(lessons.model, lessons.latents(style), lessons.contexts, lessons.empty, arguments.steps)
        path = arguments.folder / f"{name}.safetensors"
        save_file(tensors, path)
        path.chmod(0o644)
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
