"""The names that LoRA files give to a model's layers and to the parts of a term: kohya's, diffusers' and PEFT's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.keys import original_names

_DENOISER_PREFIX = "model.diffusion_model."
_WRAPPER = "text_model."
_T5, _T5_NUMBER = "t5xxl", "3"
_QKV = 3

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

_XLABS = re.compile(r"(.*_blocks\.\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
"""XLabs' trainer keeps those of Flux's attention beside it, too: of the picture, of the text, or of a single block."""

_XLABS_LAYERS = {"1": "img_attn.{}", "2": "txt_attn.{}"}
_SINGLE = {"qkv": "linear1.qkv", "proj": "linear2"}
_SAME = {"A": "down", "B": "up"}


@dataclass(frozen=True, slots=True)
class Rows:
    """A layer of the model: its path, and which rows it has of the matrix that files give a term for.

    Of `swapped` ones the second half comes first in the file.
    """

    path: str
    start: int
    stop: int
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """What a term of a file is for: a layer of a part of the model, or several that are one matrix in the file."""

    component: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]


def split_key(key: str) -> tuple[str, str] | None:
    """A key as its layer's name and the part of the term that it is; None for what is no part of a term."""
    key = key.removeprefix("base_model.model.")
    early = _EARLY.fullmatch(key)
    if early:
        text = ".self_attn" in early[1]
        layer = ("out_proj" if text else "to_out.0") if early[2] == "out" else early[2]
        named = layer if len(layer) > 1 else f"{layer}_proj" if text else f"to_{layer}"
        return f"{early[1]}.{named}", early[3]
    xlabs = _XLABS.fullmatch(key)
    if xlabs:
        block, layer, stream, part = xlabs.groups()
        return f"{block}.{_XLABS_LAYERS.get(stream, _SINGLE[layer]).format(layer)}", part
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
        shapes = {
            path: tuple(module.weight.shape)
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        layers = {path: Layer(component, shape, (Rows(path, 0, shape[0]),)) for path, shape in shapes.items()}
        if component == blueprint.family.denoiser.component:
            names |= _denoiser_names(blueprint, component, layers)
        else:
            names |= _encoder_names(blueprint, component, layers)
    return names


def _denoiser_names(blueprint: Blueprint, component: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Those of diffusers, and those of single files where there are any: web UIs and their trainers keep to these."""
    names: dict[str, Layer] = {}
    for path, layer in layers.items():
        for name in (path, f"{component}.{path}", f"lora_unet_{_flat(path)}", f"lora_{component}_{_flat(path)}"):
            names[name] = layer
    if blueprint.family.single_files:
        for original, layer in _joined(blueprint, component, layers).items():
            path = original.removeprefix(_DENOISER_PREFIX)
            for name in (path, f"diffusion_model.{path}", f"lora_unet_{_flat(path)}"):
                names.setdefault(name, layer)
    return names


def _joined(blueprint: Blueprint, component: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers by their names in single files; those that are one matrix there, one below the other, as one.

    Where that matrix has more than queries, keys and values, these three alone are `.qkv` of it.
    """
    rows: dict[str, list[Rows]] = defaultdict(list)
    origins = original_names(blueprint, component, [f"{path}.weight" for path in layers])
    for path, layer in layers.items():
        origin, height = origins[f"{path}.weight"], layer.shape[0]
        start, stop = origin.rows or ((origin.third or 0) * height, ((origin.third or 0) + 1) * height)
        rows[origin.key.removesuffix(".weight")].append(Rows(path, start, stop, origin.swapped))
    for name, joined in list(rows.items()):
        joined.sort(key=lambda each: each.start)
        if len(joined) > _QKV:
            rows[f"{name}.qkv"] = joined[:_QKV]
    return {
        name: Layer(component, (joined[-1].stop, *layers[joined[0].path].shape[1:]), tuple(joined))
        for name, joined in rows.items()
    }


def _encoder_names(blueprint: Blueprint, component: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Kohya numbers encoders from 1, T5 is the third even as second, and no number is given where there is one."""
    components = [encoder.component for encoder in blueprint.encoders]
    number = components.index(component)
    encoder, alone = blueprint.encoders[number], len(components) == 1
    numbers = {str(number + 1), *([_T5_NUMBER] if encoder.alias == _T5 else []), *([""] if alone else [])}
    prefix = blueprint.family.encoder_prefix.format(index=number, alias=encoder.alias)
    names: dict[str, Layer] = {}
    for path, layer in layers.items():
        if encoder.alias:
            named = encoder.original_name("", f"{path}.weight").key.removesuffix(".weight")
            names[f"{prefix}{named}"] = layer
            path = named.removeprefix("transformer.").removeprefix(_WRAPPER)  # noqa: PLW2901 - as files spell it
        for spelled in {path, f"{_WRAPPER}{path}"}:
            names[f"{component}.{spelled}"] = layer
            for each in numbers:
                names[f"lora_te{each}_{_flat(spelled)}"] = layer
            if alone:
                names[spelled] = layer
    return names


def _flat(path: str) -> str:
    return path.replace(".", "_")
