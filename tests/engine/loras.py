"""LoRAs with random numbers, in each form that they are published in, for models of random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 3, 2.0
STRENGTH = 0.6
"""Of a term beside the weights, about: enough to be seen."""

Terms = dict[str, tuple[Tensor, Tensor]]
"""`down` and `up` of each layer, by its name in diffusers."""


def adapted_layers(network: nn.Module, *, convolutions: bool) -> Iterator[tuple[str, Tensor]]:
    """Attention and feed-forward, as most LoRAs have; or every layer there is.

    But for SDXL's added embedding: diffusers passes over it in kohya's files, whose trainer does not train it.
    """
    for name, module in network.named_modules():
        if name.startswith("add_embedding"):
            continue
        attention = ".attn" in name or "self_attn" in name or ".ff." in name or ".mlp." in name
        if isinstance(module, nn.Linear | nn.Conv2d) and (attention or convolutions):
            yield name, module.weight


def random_terms(network: nn.Module, seed: int, *, convolutions: bool = False, rank: int = RANK) -> Terms:
    generator = torch.Generator().manual_seed(seed)
    terms: Terms = {}
    for name, weight in adapted_layers(network, convolutions=convolutions):
        out, *inner = weight.shape
        down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
        up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) * STRENGTH
        terms[name] = down, up
    return terms


def write_kohya(path: Path, terms: dict[str, Terms], *, alpha: float | None = ALPHA) -> Path:
    """`terms` by kohya's prefix: lora_unet, lora_te, lora_te1, ..."""
    tensors: dict[str, Tensor] = {}
    for prefix, layers in terms.items():
        for name, (down, up) in layers.items():
            key = f"{prefix}_{spelled(prefix, name).replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return saved(path, tensors)


def write_diffusers(path: Path, terms: dict[str, Terms], *, metadata: dict[str, Any] | None = None) -> Path:
    """`terms` by component: unet, text_encoder, ..."""
    tensors = {
        f"{component}.{spelled(component, name)}.{part}.weight": tensor
        for component, layers in terms.items()
        for name, pair in layers.items()
        for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    return saved(path, tensors, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)


def write_peft(folder: Path, terms: Terms, **config: Any) -> Path:
    folder.mkdir()
    tensors = {
        f"base_model.model.{name}.{part}.weight": tensor
        for name, pair in terms.items()
        for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    saved(folder / "adapter_model.safetensors", tensors)
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def write_early(path: Path, terms: Terms) -> Path:
    """Attention as early diffusers saved it."""
    tensors = {}
    for name, (down, up) in terms.items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        key = f"unet.{block}.processor.{layer}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return saved(path, tensors)


def spelled(component: str, name: str) -> str:
    """A text encoder's layer as all files have it, whatever version of transformers names it here."""
    is_text = component.startswith(("text_encoder", "lora_te"))
    return f"text_model.{name.removeprefix('text_model.')}" if is_text else name


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
