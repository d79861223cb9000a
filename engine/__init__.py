"""Latent diffusion in torch: load a model folder, turn requests into pictures.

Each name is imported when it is first used, so that what needs no torch never loads it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmill.engine.engine import Engine
    from latentmill.engine.guards.safety import SAFETY_CHECKERS
    from latentmill.engine.guards.watermark import embed_watermark, read_watermark, watermark_bit_accuracy
    from latentmill.engine.loading.describe import ModelDescription, describe_model, load_tokenizer
    from latentmill.engine.loading.lora import check_loras
    from latentmill.engine.sampling.levels import check_steps
    from latentmill.engine.sampling.noise import NoiseStream
    from latentmill.engine.sampling.queues import Loop, count_passes, passes, queue_rows
    from latentmill.engine.sampling.table import (
        FOLDER_SAMPLER,
        SAMPLER_CHOICES,
        SAMPLER_LABELS,
        SAMPLERS,
        SAMPLERS_WITH_ETA,
    )
    from latentmill.engine.text.lora_tags import has_lora_tags, lora_tags, without_lora_tags
    from latentmill.engine.text.prompts import parse_prompt
    from latentmill.engine.types import (
        EXECUTIONS,
        LONG_PROMPTS,
        LORA_NAME,
        LORA_SCALE_LIMIT,
        LORAS_LIMIT,
        PRECISIONS,
        PROMPT_SYNTAXES,
        SEED_LIMIT,
        WATERMARK_METHODS,
        WATERMARK_MIN_PIXELS,
        EngineError,
        GenerationRequest,
        GenerationResult,
        LoraSpec,
        ModelSpec,
        OriginalModelSpec,
        SafetyVerdict,
        SourceImage,
        UncheckedResult,
        steps_from_image,
    )

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
"""The model that ships with the package."""

_HOME = {
    "FOLDER_SAMPLER": "sampling.table",
    "SAFETY_CHECKERS": "guards.safety",
    "SAMPLERS": "sampling.table",
    "SAMPLERS_WITH_ETA": "sampling.table",
    "SAMPLER_CHOICES": "sampling.table",
    "SAMPLER_LABELS": "sampling.table",
    "Engine": "engine",
    "Loop": "sampling.queues",
    "ModelDescription": "loading.describe",
    "NoiseStream": "sampling.noise",
    "check_loras": "loading.lora",
    "check_steps": "sampling.levels",
    "count_passes": "sampling.queues",
    "describe_model": "loading.describe",
    "embed_watermark": "guards.watermark",
    "has_lora_tags": "text.lora_tags",
    "load_tokenizer": "loading.describe",
    "lora_tags": "text.lora_tags",
    "parse_prompt": "text.prompts",
    "passes": "sampling.queues",
    "queue_rows": "sampling.queues",
    "read_watermark": "guards.watermark",
    "watermark_bit_accuracy": "guards.watermark",
    "without_lora_tags": "text.lora_tags",
}
"""The modules of the names below that are not in `types`."""

__all__ = [
    "EMBEDDED_MODEL",
    "EXECUTIONS",
    "FOLDER_SAMPLER",
    "LONG_PROMPTS",
    "LORAS_LIMIT",
    "LORA_NAME",
    "LORA_SCALE_LIMIT",
    "PRECISIONS",
    "PROMPT_SYNTAXES",
    "SAFETY_CHECKERS",
    "SAMPLERS",
    "SAMPLERS_WITH_ETA",
    "SAMPLER_CHOICES",
    "SAMPLER_LABELS",
    "SEED_LIMIT",
    "WATERMARK_METHODS",
    "WATERMARK_MIN_PIXELS",
    "Engine",
    "EngineError",
    "GenerationRequest",
    "GenerationResult",
    "Loop",
    "LoraSpec",
    "ModelDescription",
    "ModelSpec",
    "NoiseStream",
    "OriginalModelSpec",
    "SafetyVerdict",
    "SourceImage",
    "UncheckedResult",
    "check_loras",
    "check_steps",
    "count_passes",
    "describe_model",
    "embed_watermark",
    "has_lora_tags",
    "load_tokenizer",
    "lora_tags",
    "parse_prompt",
    "passes",
    "queue_rows",
    "read_watermark",
    "steps_from_image",
    "watermark_bit_accuracy",
    "without_lora_tags",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'types')}"), name)
