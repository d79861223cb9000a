"""diffusers as an engine: one by one, batched, and on a GPU compiled with channels last, as its own pages advise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

COMPILE_MODE = os.environ.get("BENCH_COMPILE_MODE", "reduce-overhead")


class Diffusers:
    """One pipeline of diffusers on one device."""

    def __init__(self, folder: Path, device: str, *, compiled: bool = False) -> None:
        from diffusers import DiffusionPipeline

        half = device == "cuda"
        self._device = device
        self.pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16 if half else torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)
        if compiled:
            self.pipeline.unet.to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)
            self.pipeline.unet = torch.compile(self.pipeline.unet, mode=COMPILE_MODE, fullgraph=True)
            self.pipeline.vae.decode = torch.compile(self.pipeline.vae.decode, mode=COMPILE_MODE, fullgraph=True)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[np.ndarray[Any, Any]]:
        """Pictures of prompts, each `(h, w, 3) uint8`."""
        found = self.pipeline(
            list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **options,
        ).images
        return list((found * 255).round().astype(np.uint8))

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timesteps: Tensor, context: Tensor, extra: dict[str, Tensor] | None) -> Tensor:
        """One forward of the U-Net."""
        added = {"added_cond_kwargs": {"text_embeds": extra["pooled"], "time_ids": extra["time_ids"]}} if extra else {}
        found: Tensor = self.pipeline.unet(latents, timesteps, context, return_dict=False, **added)[0]
        return found

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures, in the precision that the pipeline would use."""
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        found: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return found
