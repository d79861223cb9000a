"""From the names of weights in files to those of our networks, by what the family declares. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from latentmill.engine.families.family import Origin
from latentmill.engine.loading.blueprint import Blueprint


def folder_name(blueprint: Blueprint, component: str, key: str) -> str | None:
    """Our name of a key in a folder's file; None for a key that no picture depends on."""
    family = blueprint.family
    named = {part.component: part.folder_name for part in (family.denoiser, family.autoencoder)}
    named |= {encoder.component: encoder.folder_name for encoder in blueprint.encoders}
    return named[component](key)


def is_ignored(blueprint: Blueprint, key: str) -> bool:
    """Whether no picture depends on a key of a single file. All others must be claimed."""
    family = blueprint.family
    more = () if family.ignored_of is None else family.ignored_of(blueprint.encoders[0])
    return any(re.match(pattern, key) for pattern in (*family.ignored, *more))


def original_names(blueprint: Blueprint, component: str, ours: Iterable[str]) -> dict[str, Origin]:
    """For each of our weights of a component, where it comes from in a single file with the original names."""
    family = blueprint.family
    if component == family.denoiser.component:
        return _prefixed(blueprint.denoiser_prefix, family.denoiser.original_names(blueprint.denoiser, ours))
    if component == family.autoencoder.component:
        return _prefixed(blueprint.autoencoder_prefix, family.autoencoder.original_names(blueprint.autoencoder, ours))
    index = [encoder.component for encoder in blueprint.encoders].index(component)
    encoder = blueprint.encoders[index]
    prefix = family.encoder_prefix.format(index=index, alias=encoder.alias)
    return {key: encoder.original_name(prefix, key) for key in ours}


def _prefixed(prefix: str, origins: dict[str, Origin]) -> dict[str, Origin]:
    return {key: dataclasses.replace(origin, key=prefix + origin.key) for key, origin in origins.items()}


def averaged_name(origin: Origin) -> Origin:
    """Where the running average of a denoiser's weight lies: its name is the weight's own, without dots."""
    name = origin.key.removeprefix("model.").replace(".", "")
    return dataclasses.replace(origin, key=f"model_ema.{name}")
