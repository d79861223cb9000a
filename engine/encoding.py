"""Pictures that requests start from, read and brought to latents: each by itself, whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from latentmill.engine.acceleration import upload
from latentmill.engine.networks.interface import Autoencoder
from latentmill.engine.sampling.start import Start
from latentmill.engine.types import EngineError, GenerationRequest, ImageSource, SourceImage

_READERS = 8
"""Pictures that are read at the same time: a store takes its time to answer."""


def read_images(requests: Sequence[GenerationRequest]) -> Mapping[int, Callable[[], SourceImage]]:
    """The pictures of the requests that have one, by place; a call gives the picture, or raises.

    They are read side by side, and once for all requests with one image at one size.
    """
    wanted = {
        place: (request.image, request.width, request.height)
        for place, request in enumerate(requests)
        if request.image is not None
    }
    if not wanted:
        return {}

    def read(image: ImageSource, width: int, height: int) -> SourceImage:
        return image.read(width, height).read(width, height)

    with ThreadPoolExecutor(_READERS) as threads:
        reading = {each: threads.submit(read, *each) for each in dict.fromkeys(wanted.values())}
    return {place: reading[each].result for place, each in wanted.items()}


def check_strength(request: GenerationRequest) -> None:
    """Raises EngineError for an image without a strength or the other way round, and for one that takes no step."""
    if (request.image is None) != (request.strength is None):
        lacking = "image" if request.image is None else "strength"
        raise EngineError(f"the request has no {lacking}; an image and its strength go together: give both or neither")
    if request.strength is None:
        return
    if not 0 < request.strength <= 1:
        raise EngineError(f"strength {request.strength:g} is outside 0..1; choose a value above 0, and at most 1")
    if request.loop[-1] == 0:
        raise EngineError(
            f"strength {request.strength:g} of {request.num_inference_steps} steps is less than one step; use "
            f"{1 / request.num_inference_steps:.4g} or more"
        )


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Latents of one picture, unscaled, `(c, h, w) float32`: their mean, and their spread if they are drawn."""

    mean: Tensor
    spread: Tensor | None


class Starts:
    """What the rows of a run start from. Each distinct picture is encoded once, when this is made."""

    def __init__(self, autoencoder: Autoencoder, rows: Sequence[GenerationRequest], device: torch.device) -> None:
        self._config = autoencoder.config
        self._device = device
        self._sources = [row.image.read(row.width, row.height) if row.image is not None else None for row in rows]
        self._encoded: dict[int, _Encoded] = {}
        for source in self._sources:
            if source is not None and id(source.pixels) not in self._encoded:
                self._encoded[id(source.pixels)] = _encode(autoencoder, source, device)

    def of(self, places: Sequence[int], steps: int, draw_noise: Callable[[], Tensor]) -> Start:
        """What these rows start from; latents that are drawn take the first noise of each row, as in diffusers."""
        sources = [source for place in places if (source := self._sources[place]) is not None]
        encoded = [self._encoded[id(source.pixels)] for source in sources]
        latents = torch.stack([each.mean for each in encoded])
        spreads = [each.spread for each in encoded if each.spread is not None]
        if spreads:
            latents = latents + torch.stack(spreads) * draw_noise()
        x0 = (latents - self._config.shift_factor) * self._config.scaling_factor
        masked = any(source.mask is not None for source in sources)
        mask = torch.stack([self._mask(source) for source in sources]) if masked else None
        return Start(x0, steps, None if mask is None else upload(mask, self._device))

    def _mask(self, source: SourceImage) -> Tensor:
        """`(1, h, w) bool` by cells, each as its first pixel is: nearest neighbours, as in diffusers."""
        factor = self._config.factor
        height, width = source.pixels.shape[:2]
        if source.mask is None:
            return torch.ones(1, height // factor, width // factor, dtype=torch.bool)
        return rearrange(torch.from_numpy(source.mask[::factor, ::factor].copy()), "h w -> 1 h w")


def _encode(autoencoder: Autoencoder, source: SourceImage, device: torch.device) -> _Encoded:
    dtype = next(autoencoder.parameters()).dtype
    pixels = upload(rearrange(torch.from_numpy(source.pixels.copy()), "h w c -> 1 c h w"), device)
    mean, spread = autoencoder.posterior((pixels.float() / 255 * 2 - 1).to(dtype))
    return _Encoded(mean[0].float(), None if spread is None else spread[0].float())
