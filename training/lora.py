"""LoRAs of one colour style each for the embedded model: `python -m training.lora`, a few minutes on one core.

Attention and the last convolutions get terms of low rank (arXiv:2106.09685), all else stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
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

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down.flatten(1)).reshape(weight.shape)


def learn(
    unet: nn.Module, objective: Callable[[], Tensor], steps: int, rate: float, rank: int, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Terms of low rank that lower the `objective` of `unet`, by the keys that diffusers gives them.

    They are for each linear layer and convolution whose path has one of `layers` in it. The U-Net is left as it was.
    """
    deltas: dict[str, LowRankDelta] = {}
    for path, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and any(part in path for part in layers):
            deltas[path] = LowRankDelta(module.weight, rank)
            parametrize.register_parametrization(module, "weight", deltas[path])
    optimizer = torch.optim.AdamW([p for delta in deltas.values() for p in delta.parameters()], lr=rate)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        loss = objective()
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


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """The file of a LoRA."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


def train(model: LatentDiffusion, latents: Tensor, contexts: Tensor, empty: Tensor, steps: int) -> dict[str, Tensor]:
    """The terms of one style, whose pictures `latents` are."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def objective() -> Tensor:
        return velocity_loss(model.denoiser, model.schedule, latents, contexts, empty, BATCH, generator)

    return learn(model.denoiser, objective, steps, RATE, RANK, LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.lora", description="Train the LoRAs that ship.")
    parser.add_argument("--steps", type=int, default=960)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    lessons = Lessons.prepare()
    for name, style in DYES.items():
        tensors = train(lessons.model, lessons.latents(style), lessons.contexts, lessons.empty, arguments.steps)
        write(tensors, arguments.folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
