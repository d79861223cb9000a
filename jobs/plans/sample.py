"""One image to be made, as the plan says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentmill.engine import GenerationRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSample:
    """One image to be made, by the model of that number.

    `extra` holds the row's carried columns under their names in the commit record. Before them, of a job with LoRAs or
    another autoencoder, their columns (option_columns.py).
    """

    ordinal: int
    sample_id: str
    row_number: int
    row_id: str
    request: GenerationRequest
    extra: dict[str, Any]
    model: int = 0
