"""Models by name: configs/models/*.yaml gives each preset its place and the parameters that suit it."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from latentmill.engine import EMBEDDED_MODEL
from latentmill.jobs.models.cache import is_url
from latentmill.jobs.store.urls import allowed_filesystem


class ModelPreset(BaseModel):
    """One file of configs/models. `path` is `embedded` for the model in the package, else a place as --model takes it.

    `revision` is the commit of a hub id; the next three are for facts that a model's files lack. `license` is
    that of the weights at `path`, as SPDX or Hugging Face name it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    path: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    batch_size: int
    revision: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    license: str | None = None


def list_presets() -> dict[str, ModelPreset]:
    """All presets by name, sorted."""
    folder = Path(__file__).parents[2] / "configs" / "models"  # importlib.resources fails on it in an editable install
    presets = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            presets[entry.name.removesuffix(".yaml")] = ModelPreset.model_validate(
                yaml.safe_load(entry.read_text(encoding="utf-8"))
            )
    return presets


def model_place(source: str) -> str:
    """What a preset, PRESET=PLACE or a place stands for: an absolute path, a URL, or a hub id."""
    preset, place = split_source(source)
    if place is None:
        assert preset is not None  # noqa: S101 - _split gives one of the two
        place = str(EMBEDDED_MODEL) if preset.path == "embedded" else preset.path
    if place.startswith("file://"):
        _, place = allowed_filesystem(place)
    if is_url(place):
        return place.rstrip("/")
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


def split_source(source: str) -> tuple[ModelPreset | None, str | None]:
    """The named preset and the named place, each None if absent."""
    presets = list_presets()
    if source in presets:
        return presets[source], None
    name, equals, place = source.partition("=")
    if equals and place and name in presets:
        return presets[name], place
    return None, source
