"""What rows say of LoRAs and of another autoencoder: columns that only the outputs of jobs with them have.

So outputs of jobs without them are what they were, and those of earlier versions are gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from latentmill.engine import GenerationRequest
from latentmill.jobs.manifests.loras import format_scales, parse_scales
from latentmill.jobs.models.resolved import ResolvedModel

SCALES, FILES = "loras", "lora_files"
"""The scale of each LoRA that counts in the row; and as JSON the place and files' sha256 of each LoRA of the job."""

DECODERS = ("vae", "preview_decoder")
"""The place of an autoencoder that took that of the model's own, and of a tiny decoder: pictures by it are previews."""


def option_fields(model: ResolvedModel) -> tuple[pa.Field, ...]:
    """The columns of a job with this model."""
    names = [*([SCALES, FILES] if model.loras else []), *(name for name in DECODERS if getattr(model, name))]
    return tuple(pa.field(name, pa.string()) for name in names)


def option_values(model: ResolvedModel, request: GenerationRequest) -> dict[str, Any]:
    """Their values in one row."""
    files = {name: {"place": place, "sha256": model.lora_files(name)} for name, place in model.loras.items()}
    scales = {SCALES: format_scales(dict(request.loras)), FILES: json.dumps(files, sort_keys=True)}
    values = scales | {name: getattr(model, name) for name in DECODERS}
    return {field.name: values[field.name] for field in option_fields(model)}


def recorded_places(row: Mapping[str, Any]) -> dict[str, str]:
    """The places of the job's LoRAs by name, from a row."""
    return {name: f"{entry['place']}:1" for name, entry in json.loads(row.get(FILES) or "{}").items()}


def recorded_scales(row: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The scale of each of them in the row, also where it is 0."""
    scales = dict.fromkeys(recorded_places(row), 0.0)
    return tuple((scales | parse_scales(row[SCALES])).items()) if scales else ()
