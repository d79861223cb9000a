"""What the rows of a job with LoRAs say of them: columns that only the outputs of such jobs have."""

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


def lora_fields(model: ResolvedModel) -> tuple[pa.Field, ...]:
    """The columns; none without LoRAs, so that outputs of earlier versions are gone on with."""
    return (pa.field(SCALES, pa.string()), pa.field(FILES, pa.string())) if model.loras else ()


def lora_values(model: ResolvedModel, request: GenerationRequest) -> dict[str, Any]:
    """Their values in one row."""
    if not model.loras:
        return {}
    files = {name: {"place": place, "sha256": model.lora_files(name)} for name, place in model.loras.items()}
    return {SCALES: format_scales(dict(request.loras)), FILES: json.dumps(files, sort_keys=True)}


def recorded_places(row: Mapping[str, Any]) -> dict[str, str]:
    """The places of the job's LoRAs by name, from a row."""
    return {name: f"{entry['place']}:1" for name, entry in json.loads(row.get(FILES) or "{}").items()}


def recorded_scales(row: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The scale of each of them in the row, also where it is 0."""
    scales = dict.fromkeys(recorded_places(row), 0.0)
    return tuple((scales | parse_scales(row[SCALES])).items()) if scales else ()
