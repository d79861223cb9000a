"""Our networks, taken out of a loaded engine to be timed alone: nothing else knows where the engine keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from latentmill.engine import Engine
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.unet import UNet

Network = TypeVar("Network", bound=nn.Module)

_DEPTH = 3


def unet_of(engine: Engine) -> UNet:
    """The U-Net that the engine runs, laid out as it runs it."""
    return _first(engine, UNet)


def decode_by(engine: Engine, latents: Tensor) -> Tensor:
    """Latents to pictures as the engine decodes them, slices included."""
    from latentmill.engine.acceleration import decode

    return decode(_first(engine, AutoencoderKL), latents)


def _first(engine: Engine, kind: type[Network]) -> Network:
    found = next((each for each in _parts(engine, _DEPTH) if isinstance(each, kind)), None)
    if found is None:
        raise LookupError(f"the engine has no {kind.__name__} within {_DEPTH} attributes; correct bench/parts.py")
    return found


def _parts(owner: Any, depth: int) -> Iterator[Any]:
    names = [each.name for each in fields(owner)] if is_dataclass(owner) else list(getattr(owner, "__dict__", ()))
    values = [getattr(owner, name) for name in names]
    yield from values
    if depth > 1:
        for value in values:
            if type(value).__module__.startswith("latentmill."):
                yield from _parts(value, depth - 1)
