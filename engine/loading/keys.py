"""From the names of weights in files to those of our networks, by what the family declares. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from latentmill.engine.families.family import Origin
from latentmill.engine.loading.blueprint import Blueprint

_EARLY_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Autoencoders saved by early diffusers name the parts of their attention so; later versions read both."""


def folder_name(blueprint: Blueprint, component: str, key: str) -> str | None:
    """Our name of a key in a folder's file; None for a key that no picture depends on."""
    if component == blueprint.family.vae_component:
        for old, new in _EARLY_ATTENTION.items():
            key = key.replace(old, new)
    for encoder in blueprint.encoders:
        if encoder.component == component:
            return encoder.folder_name(key)
    return key


def is_ignored(blueprint: Blueprint, key: str) -> bool:
    """Whether no picture depends on a key of a single file. All others must be claimed."""
    family = blueprint.family
    more = () if family.ignored_of is None else family.ignored_of(blueprint.encoders[0])
    return any(re.match(pattern, key) for pattern in (*family.ignored, *more))


def original_names(blueprint: Blueprint, component: str, ours: Iterable[str]) -> dict[str, Origin]:
    """For each of our weights of a component, where it comes from in a single file with the original names."""
    family = blueprint.family
    if component == "unet":
        return family.unet_origins(blueprint.unet, ours)
    if component == family.vae_component:
        return family.vae_origins(blueprint.vae, ours)
    index = [encoder.component for encoder in blueprint.encoders].index(component)
    prefix = family.encoder_prefix.format(index=index)
    return {key: blueprint.encoders[index].original_name(prefix, key) for key in ours}


def averaged_name(origin: Origin) -> Origin:
    """Where the running average of a U-Net's weight lies: its name is the weight's own, without dots."""
    name = origin.key.removeprefix("model.").replace(".", "")
    return dataclasses.replace(origin, key=f"model_ema.{name}")
