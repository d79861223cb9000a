"""Latent diffusion in torch: load a model folder, turn requests into pictures.

Names that need torch are imported when they are first used, so that planning and reading results start fast.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentmill.engine.loading.describe import ModelDescription, describe_model, load_tokenizer
from latentmill.engine.sampling.timesteps import check_steps
from latentmill.engine.text.prompts import parse_prompt
from latentmill.engine.types import (
    FOLDER_SAMPLER,
    LONG_PROMPTS,
    PROMPT_SYNTAXES,
    SAMPLER_CHOICES,
    SAMPLERS,
    SAMPLERS_WITH_ETA,
    SEED_LIMIT,
    WATERMARK_METHODS,
    WATERMARK_MIN_PIXELS,
    EngineError,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    OriginalModelSpec,
    SafetyVerdict,
)

if TYPE_CHECKING:
    from latentmill.engine.engine import Engine
    from latentmill.engine.guards.watermark import embed_watermark, read_watermark, watermark_bit_accuracy
    from latentmill.engine.sampling.noise import NoiseStream

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
"""The model that ships with the package."""

_HEAVY = {
    "Engine": "latentmill.engine.engine",
    "NoiseStream": "latentmill.engine.sampling.noise",
    "embed_watermark": "latentmill.engine.guards.watermark",
    "read_watermark": "latentmill.engine.guards.watermark",
    "watermark_bit_accuracy": "latentmill.engine.guards.watermark",
}

__all__ = [
    "EMBEDDED_MODEL",
    "FOLDER_SAMPLER",
    "LONG_PROMPTS",
    "PROMPT_SYNTAXES",
    "SAMPLERS",
    "SAMPLERS_WITH_ETA",
    "SAMPLER_CHOICES",
    "SEED_LIMIT",
    "WATERMARK_METHODS",
    "WATERMARK_MIN_PIXELS",
    "Engine",
    "EngineError",
    "GenerationRequest",
    "GenerationResult",
    "ModelDescription",
    "ModelSpec",
    "NoiseStream",
    "OriginalModelSpec",
    "SafetyVerdict",
    "check_steps",
    "describe_model",
    "embed_watermark",
    "load_tokenizer",
    "parse_prompt",
    "read_watermark",
    "watermark_bit_accuracy",
]


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(import_module(_HEAVY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
