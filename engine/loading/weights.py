"""Weights from files into networks: each key of a file is used exactly once, or is one that the family ignores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from latentmill.engine.families.family import Origin, TextEncoderSpec
from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.checkpoint import Shape, WeightsFile, open_weights
from latentmill.engine.loading.files import shown
from latentmill.engine.loading.keys import averaged_name, folder_name, is_ignored, original_names
from latentmill.engine.loading.layout import ModelLayout
from latentmill.engine.loading.vae import origins_in_file
from latentmill.engine.networks.interface import Autoencoder
from latentmill.engine.types import EngineError

Module = TypeVar("Module", bound=nn.Module)


def load_denoiser(layout: ModelLayout, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model's denoiser, in `dtype` on `device`, ready for inference."""
    blueprint = layout.blueprint
    with torch.device("meta"):
        network = blueprint.family.denoiser.build(blueprint.denoiser)
    return _fill(network, layout, blueprint.family.denoiser.component, dtype, device)


def load_autoencoder(layout: ModelLayout, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """The model's autoencoder, in `dtype` on `device`, ready for inference."""
    blueprint = layout.blueprint
    with torch.device("meta"):
        network = blueprint.family.autoencoder.build(blueprint.autoencoder)
    return _fill(network, layout, blueprint.family.autoencoder.component, dtype, device)


def load_text_encoder(
    layout: ModelLayout, encoder: TextEncoderSpec, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """One text encoder, in `dtype` on `device`, ready for inference."""
    with torch.device("meta"):
        module = encoder.build()
    return _fill(module, layout, encoder.component, dtype, device)


def check_claims(layout: ModelLayout) -> None:
    """Check a single file as a whole, before its parts are loaded. Raises EngineError as `claim_single_file`."""
    if not layout.single_file:
        return
    shapes = open_weights(layout.path).shapes
    claims = claim_single_file(layout.own_blueprint or layout.blueprint, shapes, layout.path, layout.original)
    if layout.averaged:
        names = {averaged_name(origin).key for origin in claims[layout.blueprint.family.denoiser.component].values()}
        _refuse(sorted(names - shapes.keys()), [], f"{layout.path} has no whole running average of its weights")


def claim_single_file(
    blueprint: Blueprint, shapes: Mapping[str, Shape], where: object, components: Collection[str] | None = None
) -> dict[str, dict[str, Origin]]:
    """For each component, where each of its weights lies in a file of the original names.

    Raises EngineError unless every key of the file is claimed, or one that the family ignores, and none is missing.
    """
    with torch.device("meta"):
        modules = {
            component: build()
            for component, build in blueprint.builders.items()
            if components is None or component in components
        }
    claims = {
        component: original_names(blueprint, component, module.state_dict()) for component, module in modules.items()
    }
    claimed = {origin.key for origins in claims.values() for origin in origins.values()}
    missing = sorted(claimed - shapes.keys())
    unexpected = sorted(key for key in shapes.keys() - claimed if not is_ignored(blueprint, key))
    _refuse(missing, unexpected, f"{where} does not match what its keys say it is")
    return claims


def _fill(module: Module, layout: ModelLayout, component: str, dtype: torch.dtype, device: torch.device) -> Module:
    """Give a module on the meta device its weights. Raises EngineError that names a bad key."""
    file = open_weights(layout.weights[component])
    expected = module.state_dict()
    if layout.vae is not None and component == layout.blueprint.family.autoencoder.component:
        if layout.vae.prefix is None:
            origins = _claim_folder_file(file, layout.blueprint, component, expected)
        else:
            origins = origins_in_file(layout.vae, expected, file)
    elif component in layout.original:
        origins = original_names(layout.blueprint, component, expected)
        if layout.averaged and component == layout.blueprint.family.denoiser.component:
            origins = {key: averaged_name(origin) for key, origin in origins.items()}
    else:
        origins = _claim_folder_file(file, layout.blueprint, component, expected)
    state = {key: _read(file, origin, tuple(expected[key].shape)).to(device, dtype) for key, origin in origins.items()}
    module.load_state_dict(state, assign=True)
    place_constants(module, device)
    return module.eval().requires_grad_(requires_grad=False)


def _claim_folder_file(
    file: WeightsFile, blueprint: Blueprint, component: str, ours: Mapping[str, Tensor]
) -> dict[str, Origin]:
    found: dict[str, Origin] = {}
    for key in file.shapes:
        name = folder_name(blueprint, component, key)
        if name is not None:
            found[name] = Origin(key)
    _refuse(
        sorted(ours.keys() - found.keys()),
        sorted(found[name].key for name in found.keys() - ours.keys()),
        f"{file.path} does not match its config.json",
    )
    return found


def _refuse(missing: list[str], unexpected: list[str], problem: str) -> None:
    if missing or unexpected:
        raise EngineError(
            f"{problem}: {len(missing)} keys missing (first: {shown(missing[:1])}), "
            f"{len(unexpected)} unexpected (first: {shown(unexpected[:1])})"
        )


def _read(file: WeightsFile, origin: Origin, expected: Shape) -> Tensor:
    tensor = file.read(origin.key)
    if origin.third is not None:
        tensor = rearrange(tensor, "(three d) ... -> three d ...", three=3)[origin.third]
    if origin.rows is not None:
        tensor = tensor[slice(*origin.rows)]
    if origin.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    if origin.transposed:
        tensor = tensor.T
    if tensor.shape == (*expected, 1, 1):
        # Many checkpoints hold the linear layers around attention as 1x1 convolutions.
        tensor = rearrange(tensor, "o i 1 1 -> o i")
    if tuple(tensor.shape) != expected:
        raise EngineError(
            f"{file.path}: {origin.key} has shape {tuple(tensor.shape)}, its config.json asks for {expected}"
        )
    return tensor.contiguous()


def place_constants(module: nn.Module, device: torch.device) -> None:
    """Give a module on the meta device the buffers that no checkpoint holds: CLIP's positions, counted from 0."""
    for name, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            continue
        path, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise EngineError(f"{type(module).__name__} has a buffer {name!r} that no checkpoint holds")
        positions = torch.arange(buffer.shape[-1], device=device)
        setattr(module.get_submodule(path), leaf, rearrange(positions, "l -> 1 l"))
