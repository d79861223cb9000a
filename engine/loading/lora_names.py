"""The names that LoRA files give to a model's layers and to the parts of a term: kohya's, diffusers' and PEFT's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.keys import original_names

_DENOISER_PREFIX = "model.diffusion_model."
_WRAPPER = "text_model."

_PARTS = (
    (re.compile(r"(.+)\.lora_(down|up|mid)\.weight"), r"\2"),
    (re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight"), r"\2"),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"), r"\2"),
    (re.compile(r"(.+)\.(alpha)"), r"\2"),
    (re.compile(r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.default)?"), r"\2"),
)
"""How a key ends, and which part of a layer's term it is."""

_EARLY = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
"""Early diffusers keeps the terms of an attention beside its layers."""

_SAME = {"A": "down", "B": "up"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the model: the part that it is in, its place in there, and its name without that part's."""

    component: str
    path: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """Its path as files spell it, whatever version of transformers built the network."""
        return self.path.removeprefix(_WRAPPER)


def split_key(key: str) -> tuple[str, str] | None:
    """A key as its layer's name and the part of the term that it is; None for what is no part of a term."""
    key = key.removeprefix("base_model.model.")
    early = _EARLY.fullmatch(key)
    if early:
        text = ".self_attn" in early[1]
        layer = ("out_proj" if text else "to_out.0") if early[2] == "out" else early[2]
        named = layer if len(layer) > 1 else f"{layer}_proj" if text else f"to_{layer}"
        return f"{early[1]}.{named}", early[3]
    for pattern, part in _PARTS:
        match = pattern.fullmatch(key)
        if match:
            found = match.expand(part)
            return match[1], _SAME.get(found, found)
    return None


def layer_names(blueprint: Blueprint, networks: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Every name that files have for the linear and convolutional layers of these networks, by component."""
    names: dict[str, Layer] = {}
    for component, network in networks.items():
        layers = [
            Layer(component, path, tuple(module.weight.shape))
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        if component == blueprint.family.denoiser.component:
            names |= _denoiser_names(blueprint, component, layers)
        else:
            names |= _encoder_names(blueprint, component, layers)
    return names


def _denoiser_names(blueprint: Blueprint, component: str, layers: list[Layer]) -> dict[str, Layer]:
    names: dict[str, Layer] = {}
    for layer in layers:
        names[layer.path] = names[f"{component}.{layer.path}"] = layer
        names[f"lora_unet_{_flat(layer.path)}"] = layer
    if blueprint.family.single_files:
        origins = original_names(blueprint, component, [f"{layer.path}.weight" for layer in layers])
        for layer in layers:
            origin = origins[f"{layer.path}.weight"]
            if origin.third is None:  # no other layer has the original's name
                original = origin.key.removeprefix(_DENOISER_PREFIX).removesuffix(".weight")
                names.setdefault(f"lora_unet_{_flat(original)}", layer)
    return names


def _encoder_names(blueprint: Blueprint, component: str, layers: list[Layer]) -> dict[str, Layer]:
    """Kohya numbers encoders from 1, and leaves the number out where there is one."""
    components = [encoder.component for encoder in blueprint.encoders]
    alone = len(components) == 1
    number = components.index(component) + 1
    names: dict[str, Layer] = {}
    for layer in layers:
        for path in {layer.module, f"{_WRAPPER}{layer.module}"}:
            names[f"{component}.{path}"] = layer
            names[f"lora_te{number}_{_flat(path)}"] = layer
            if alone:
                names[path] = names[f"lora_te_{_flat(path)}"] = layer
    return names


def _flat(path: str) -> str:
    return path.replace(".", "_")
