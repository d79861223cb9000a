"""Where a LoRA lies: one safetensors file, or a folder as diffusers and PEFT save it. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmill.engine.loading.checkpoint import WeightsFile, open_weights
from latentmill.engine.loading.files import JSON_LIMIT, read_json, shown
from latentmill.engine.types import LORA_NAME, LORAS_LIMIT, EngineError, LoraSpec

_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFiles:
    """A LoRA's files. `config` is PEFT's adapter_config.json, which holds what its weights file does not: alpha."""

    name: str
    weights: Path
    config: Path | None

    @property
    def files(self) -> dict[str, Path]:
        """All that can change a pixel, by a name that does not depend on this machine."""
        paths = [self.weights, *([self.config] if self.config else [])]
        return {f"loras/{self.name}/{path.name}": path for path in paths}


def find_loras(specs: tuple[LoraSpec, ...]) -> dict[str, LoraFiles]:
    """Each LoRA's files by its name. Raises EngineError for a bad name, one named twice, and a missing file."""
    if len(specs) > LORAS_LIMIT:
        raise EngineError(f"{len(specs)} LoRAs are named, the limit is {LORAS_LIMIT}; name fewer")
    found: dict[str, LoraFiles] = {}
    for spec in specs:
        if not re.fullmatch(LORA_NAME, spec.name):
            raise EngineError(f"LoRA name {shown(spec.name)} must match {LORA_NAME}; give it another name")
        if spec.name in found:
            raise EngineError(f"LoRA {spec.name} is named twice; give each its own name")
        found[spec.name] = _find(spec)
    return found


def _find(spec: LoraSpec) -> LoraFiles:
    place = Path(spec.path)
    if place.is_dir():
        weights = next((place / name for name in _WEIGHTS if (place / name).exists()), None)
        if weights is None:
            raise EngineError(f"LoRA {spec.name}: {place} holds no LoRA: looked for {', '.join(_WEIGHTS)}")
    elif place.suffix == _SUFFIX and place.exists():
        weights = place
    elif place.exists():
        raise EngineError(f"LoRA {spec.name}: {place} is read from {_SUFFIX} alone; convert the file")
    else:
        raise EngineError(f"LoRA {spec.name}: {place} does not exist; give a {_SUFFIX} file, or a folder with one")
    config = weights.with_name(_CONFIG)
    return LoraFiles(name=spec.name, weights=weights, config=config if config.exists() else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alphas:
    """What multiplies the terms of a file that does not hold an alpha for each: `alpha / rank`, by rslora its root."""

    alpha: float | None
    patterns: Mapping[str, float]
    root: bool

    def of(self, module: str) -> float | None:
        """The alpha of one layer, by the end of its name; None where the files do not say, which means its rank."""
        own = [value for end, value in self.patterns.items() if f".{module}".endswith(f".{end}")]
        return own[0] if own else self.alpha


_NO_ALPHAS = Alphas(alpha=None, patterns={}, root=False)


def open_lora(lora: LoraFiles) -> tuple[WeightsFile, Mapping[str, Alphas]]:
    """The weights, and for each component that the files name what is said of alphas; PEFT names none: its key is "".

    Raises EngineError that names what is wrong.
    """
    file = open_weights(lora.weights)
    if lora.config is not None:
        return file, {"": _alphas(read_json(lora.config), str(lora.config))}
    if any(key.startswith("base_model.") for key in file.shapes):
        raise EngineError(
            f"{lora.weights} was saved by PEFT, whose alpha is in {_CONFIG}, which is not beside it; put it there"
        )
    text = file.metadata.get(_DIFFUSERS_METADATA)
    if text is None:
        return file, {}
    where = f"{lora.weights}: its {_DIFFUSERS_METADATA}"
    try:
        content = json.loads(text) if len(text) <= JSON_LIMIT else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise EngineError(f"{where} is no JSON object; save the file again")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = value
    return file, {component: _alphas(config, where) for component, config in parts.items()}


def _alphas(config: Mapping[str, Any], where: str) -> Alphas:
    """What PEFT's config says of alphas. A pattern must be the end of a layer's name, and no other expression."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", end) for end in patterns):
        raise EngineError(
            f"{where} has alpha_pattern={shown(patterns)}; expected ends of layers' names, each with a number"
        )
    for value in (alpha, *patterns.values()):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e6):
            raise EngineError(f"{where} has the alpha {shown(value)}; expected a number up to a million")
    return Alphas(alpha=alpha, patterns=patterns, root=bool(config.get("use_rslora")))
