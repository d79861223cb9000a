"""A model that was found, read and hashed: what a plan keeps of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentmill.engine import LoraSpec, ModelSpec
from latentmill.jobs.models.cache import listing_digest
from latentmill.jobs.models.presets import model_place

_LATER = ("loras", "lora_scales", "vae", "preview_decoder", "fault")
"""Fields that documents have had since outputs lie somewhere."""

_WEIGHTS = (".safetensors", ".ckpt", ".bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A complete model that exists, and what it implies for a job.

    `source` is what the user named; it stays valid on another machine, where the files may be elsewhere. `revision` is
    the commit that a hub id stood for. The next three are as `ModelSpec` takes them, the two after them what the model
    works with. `files` maps each file that can change a pixel to its sha256. `license` is known of a preset's own
    weights. `loras` are the places of LoRAs by name, and `lora_scales` what they count where nothing else says so.
    `vae` and `preview_decoder` are places of what decodes in the model's own autoencoder's stead. `fault` says why a
    model among others cannot be used: then it has no files, and the rest is another's.
    """

    source: str
    revision: str | None
    tokenizer: str | None
    prediction_type: str | None
    timestep_spacing: str | None
    predicts: str
    spacing: str
    name: str
    family: str
    factor: int
    latent_channels: int
    max_tokens: int | None
    files: Mapping[str, str]
    license: str | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    lora_scales: Mapping[str, float] = field(default_factory=dict)
    vae: str | None = None
    preview_decoder: str | None = None
    fault: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What a plan's document has of it: nothing of what it does not use and older versions do not know."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value or name not in _LATER}

    def lora_files(self, name: str) -> dict[str, str]:
        """The files of a LoRA, each with its sha256."""
        prefix = f"loras/{name}/"
        return {path.removeprefix(prefix): digest for path, digest in self.files.items() if path.startswith(prefix)}

    @property
    def digest(self) -> str:
        """One hash over all the files' names and hashes."""
        return listing_digest(self.files)

    @property
    def weights_digest(self) -> str:
        """The sha256 of the single file, or of the denoiser's weights: what web UIs call the model's hash."""
        single_file = (digest for path, digest in self.files.items() if "/" not in path and path.endswith(_WEIGHTS))
        denoiser = (
            digest
            for path, digest in self.files.items()
            if path.startswith(("unet/", "transformer/")) and path.endswith(_WEIGHTS)
        )
        return next(single_file, next(denoiser, ""))

    @property
    def spec(self) -> ModelSpec:
        """The model by name: `jobs.models.place.place_model` makes it one that the engine may load."""
        return ModelSpec(
            model=model_place(self.source),
            revision=self.revision,
            tokenizer=self.tokenizer,
            prediction_type=self.prediction_type,
            timestep_spacing=self.timestep_spacing,
            loras=tuple(LoraSpec(name=name, path=place) for name, place in self.loras.items()),
            vae=self.vae,
            preview_decoder=self.preview_decoder,
        )
