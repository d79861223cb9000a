"""Another autoencoder in the place of a model's own: one that bears fp16, or a tiny one for previews. Without torch."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentmill.engine.families import compvis
from latentmill.engine.families.family import NetworkSpec, Origin
from latentmill.engine.loading.blueprint import Blueprint, check_fit
from latentmill.engine.loading.checkpoint import WeightsFile, open_weights
from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.loading.files import read_json, shown
from latentmill.engine.loading.tiny_config import TinyDecoderConfig
from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from latentmill.engine.networks.tiny_decoder import TinyDecoder

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_TINY = "AutoencoderTiny"
_CLASSES = ("AutoencoderKL", "VQModel")
_IGNORED = re.compile(r"(loss|model_ema)\.")


@dataclass(frozen=True, slots=True)
class OtherVae:
    """An autoencoder that a model is given: a blueprint with it, its files, and how the weights' keys are named.

    `prefix` begins the original names of a single file's keys, and is None for a folder.
    """

    blueprint: Blueprint
    weights: Path
    files: dict[str, Path]
    prefix: str | None


def find_vae(place: str, blueprint: Blueprint, *, tiny: bool) -> OtherVae:
    """The autoencoder that lies there, for a model of this blueprint.

    A folder of diffusers (or of a whole model, whose `vae/` is taken), or a safetensors file with the original's names.
    A file does not hold its scaling, which is that of the model. Raises EngineError for one that does not fit.
    """
    path = Path(place)
    if path.is_dir():
        found = _folder(path / "vae" if (path / "vae" / "config.json").exists() else path, blueprint, tiny=tiny)
    elif path.suffix == ".safetensors" and path.exists():
        found = _file(open_weights(path), blueprint, tiny=tiny)
    else:
        kind = "is read from .safetensors alone; convert the file" if path.exists() else "does not exist"
        raise EngineError(f"autoencoder {place} {kind}; give a diffusers folder or a .safetensors file")
    own, other = blueprint.autoencoder, found.blueprint.autoencoder
    if own.factor != other.factor:
        raise EngineError(f"autoencoder {place} has {other.factor} pixels per cell, the model's own has {own.factor}")
    check_fit(found.blueprint, place)
    return found


def _folder(folder: Path, blueprint: Blueprint, *, tiny: bool) -> OtherVae:
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if (name == _TINY) != tiny or (not tiny and name not in _CLASSES):
        wanted = _TINY if tiny else " or ".join(_CLASSES)
        raise EngineError(
            f"{folder}/config.json is of {shown(name)}, expected {wanted}: see --vae and --preview-decoder"
        )
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise EngineError(f"{folder} has no weights: looked for {', '.join(_WEIGHTS)}")
    spec: NetworkSpec[Any, Any] = _TINY_DECODER if tiny else blueprint.family.autoencoder
    changed = _with(blueprint, spec, spec.read(config, str(folder / "config.json")))
    return OtherVae(changed, weights, {"vae/config.json": folder / "config.json", f"vae/{weights.name}": weights}, None)


def _file(file: WeightsFile, blueprint: Blueprint, *, tiny: bool) -> OtherVae:
    own = blueprint.autoencoder
    spec: NetworkSpec[Any, Any] = _TINY_DECODER if tiny else blueprint.family.autoencoder
    prefix = compvis.VAE if any(key.startswith(compvis.VAE) for key in file.shapes) else ""
    named = {f"{compvis.VAE}{key.removeprefix(prefix)}": shape for key, shape in file.shapes.items()}
    try:
        if tiny:
            width, latents = file.shapes["1.weight"][:2]
            config: Any = TinyDecoderConfig.from_dict(
                {"latent_channels": latents, "decoder_block_out_channels": [width] * 4}, str(file.path)
            )
        else:
            json = compvis.vae_config(named, scaling_factor=own.scaling_factor, force_upcast=own.force_upcast)
            config = dataclasses.replace(VAEConfig.from_dict(json, str(file.path)), shift_factor=own.shift_factor)
    except (KeyError, IndexError, ValueError) as error:
        kind = "a tiny decoder" if tiny else "an autoencoder"
        raise EngineError(f"{file.path} is not {kind} with the original's names: {error}") from None
    return OtherVae(_with(blueprint, spec, config), file.path, {f"vae/{file.path.name}": file.path}, prefix)


def _with(blueprint: Blueprint, spec: NetworkSpec[Any, Any], config: Any) -> Blueprint:
    family = dataclasses.replace(blueprint.family, autoencoder=spec)
    return dataclasses.replace(blueprint, family=family, autoencoder=config)


def origins_in_file(vae: OtherVae, keys: Iterable[str], file: WeightsFile) -> dict[str, Origin]:
    """Where each of our weights lies in a single file. Raises EngineError unless every key is claimed, and there."""
    spec = vae.blueprint.family.autoencoder
    named = spec.original_names(vae.blueprint.autoencoder, keys)
    origins = {
        ours: dataclasses.replace(origin, key=f"{vae.prefix}{origin.key.removeprefix(compvis.VAE)}")
        for ours, origin in named.items()
    }
    claimed = {origin.key for origin in origins.values()}
    missing = sorted(claimed - file.shapes.keys())
    over = sorted(key for key in file.shapes.keys() - claimed if not _IGNORED.match(key.removeprefix(vae.prefix or "")))
    if missing or over:
        raise EngineError(
            f"{file.path} is no such autoencoder: {len(missing)} keys missing (first: {shown(missing[:1])}), "
            f"{len(over)} unexpected (first: {shown(over[:1])})"
        )
    return origins


def _tiny_folder_name(key: str) -> str | None:
    """The encoder is not used for pictures."""
    return None if key.startswith("encoder.") else key.removeprefix("decoder.")


def _tiny_origins(_: TinyDecoderConfig, ours: Iterable[str]) -> dict[str, Origin]:
    """The original counts its clamp as a layer, the first one."""
    counted = (re.fullmatch(r"layers\.(\d+)\.(.+)", key) for key in ours)
    return {match[0]: Origin(f"{int(match[1]) + 1}.{match[2]}") for match in counted if match}


def _build_tiny(config: TinyDecoderConfig) -> TinyDecoder:
    from latentmill.engine.networks.tiny_decoder import TinyDecoder

    return TinyDecoder(config)


_TINY_DECODER = NetworkSpec(
    component="vae",
    read=TinyDecoderConfig.from_dict,
    build=_build_tiny,
    folder_name=_tiny_folder_name,
    original_names=_tiny_origins,
)
