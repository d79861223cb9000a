"""LoRAs of one colour style each for the embedded model: `python -m training.lora`, a few minutes on one core.

The model's own pictures of the sample prompts, dyed, are what a LoRA learns to draw for the same prompts: attention and
the last convolutions get terms of low rank (arXiv:2106.09685), all else stays. Nothing but the model is needed, so that
the LoRAs can be made again after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from latentmill.engine import EMBEDDED_MODEL, Engine, GenerationRequest, ModelSpec
from latentmill.engine.latent_diffusion import LatentDiffusion
from latentmill.engine.networks.autoencoder import AutoencoderKL

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "loras"
PROMPTS = ROOT / "configs" / "prompts" / "sample.txt"

STYLES: Mapping[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sepia": ((60, 35, 15), (245, 225, 185)),
    "blueprint": ((15, 45, 120), (225, 238, 255)),
}
"""What black and white become; every colour becomes its lightness between the two."""

RANK = 4
LAYERS = (".attn", "up_blocks.2.resnets", "conv_out")
RATE = 4e-3
BATCH = 8
CAPTION_DROPOUT = 0.1
STEPS, GUIDANCE = 12, 4.0
"""Of the pictures that are dyed."""


class LowRankDelta(nn.Module):
    """A weight `(o, i, ...)` plus `up (o, r)` times `down (r, i, ...)`; `up` begins at zero: nothing changes yet."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down.flatten(1)).reshape(weight.shape)


def dyed(pixels: NDArray[np.uint8], style: str) -> NDArray[np.uint8]:
    """`(h, w, 3) uint8` in the two colours of a style."""
    dark, light = (np.array(colour, dtype=np.float32) for colour in STYLES[style])
    lightness = (pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255)[..., None]
    return (dark + lightness * (light - dark)).round().astype(np.uint8)


def draw(engine: Engine, prompts: list[str]) -> list[NDArray[np.uint8]]:
    """One picture for each prompt, at the size that the model was trained for. Raises RuntimeError if one fails."""
    width, height = engine.description.default_size
    requests = [
        GenerationRequest(
            prompt=prompt, seed=seed, width=width, height=height, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
        for seed, prompt in enumerate(prompts)
    ]
    pictures = []
    for request, result in zip(requests, engine.generate(requests), strict=True):
        if result.pixels is None:
            raise RuntimeError(f"{request.prompt!r} failed: {result.error}")
        pictures.append(result.pixels)
    return pictures


def encode(model: LatentDiffusion, pictures: list[NDArray[np.uint8]]) -> Tensor:
    """Pictures as the denoiser's latents `(n, c, h, w)`."""
    autoencoder = model.autoencoder
    if not isinstance(autoencoder, AutoencoderKL):
        raise TypeError(f"the model's autoencoder is a {type(autoencoder).__name__}, not one with KL")
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        means = torch.cat([autoencoder.encode(part).mean for part in torch.split(pixels, 4)])
    return (means - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


def train(model: LatentDiffusion, latents: Tensor, contexts: Tensor, empty: Tensor, steps: int) -> dict[str, Tensor]:
    """The terms that are learned, by the keys that diffusers gives them."""
    torch.manual_seed(0)
    unet, schedule = model.denoiser, model.schedule
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
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, 1, 1, generator=generator) < CAPTION_DROPOUT
        # One timestep from each equal part of the schedule.
        places = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (places * schedule.config.num_train_timesteps).long()
        noise = torch.randn(latents[pick].shape, generator=generator)
        alpha_bar = schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents[pick]
        noisy = schedule.add_noise(latents[pick], noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, torch.where(dropped, empty, contexts[pick])), velocity)
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
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    spec = ModelSpec(model=str(EMBEDDED_MODEL), safety="none")
    engine = Engine.load(spec, device="cpu", dtype="float32", batch_size=4)
    model = engine._models
    if not isinstance(model, LatentDiffusion):
        raise TypeError(f"{EMBEDDED_MODEL} is not run by the engine itself")
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    pictures = draw(engine, prompts)
    with torch.no_grad():
        contexts, empty = (model.text.encode(texts).context.clone() for texts in (prompts, [""]))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        latents = encode(model, [dyed(picture, style) for picture in pictures])
        tensors = train(model, latents, contexts, empty, arguments.steps)
        path = arguments.folder / f"{style}.safetensors"
        save_file(tensors, path)
        path.chmod(0o644)
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
