"""A published row as a recipe: all it takes to make its picture again, wherever the row comes from.

Only the row is read: rows of several jobs may lie in one dataset, and their outputs may be gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from latentmill.engine import PRECISIONS, GenerationRequest, ModelSpec
from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.images import PlannedImage
from latentmill.jobs.manifests.loras import parse_scales
from latentmill.jobs.models.choice import ModelChoice, resolve_model
from latentmill.jobs.models.place import place_model
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.columns import own_fields
from latentmill.jobs.plans.option_columns import recorded_places, recorded_scales
from latentmill.jobs.postprocess import encode_picture, finish_pixels
from latentmill.jobs.spec import JobSpec

if TYPE_CHECKING:
    from latentmill.engine import Engine

_FORMAT = 3
"""The first format whose rows have all that it takes."""

_MERGED = re.compile(r", merged (.+)$")
_COMPILED = re.compile(r", channels last, compiled(?=$|, )")
_THREADS = re.compile(r", (\d+) threads, ")
_BFLOAT16 = ", bfloat16, "
_DTYPES = {precision: dtype for dtype, precision in PRECISIONS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What one picture was made of.

    The same bits come out at `slot` of a batch of `batch_size`, on the same `execution_class`; elsewhere, nearly so.
    """

    request: GenerationRequest
    model: ModelChoice
    model_sha256: str
    prompt_syntax: str
    long_prompts: str
    safety: str
    safety_threshold: float | None
    on_flagged: str
    watermark: str
    watermark_text: str
    dtype: str
    threads: int | None
    batch_size: int
    slot: int
    execution_class: str
    version: str
    format_version: int

    def resolve(self) -> ResolvedModel:
        """The model as it is now. Raises UsageError if it is missing, JobError if its bytes are not the row's."""
        try:
            model, _, _ = resolve_model(self.model)
        except UsageError:  # a pipeline of diffusers has a schedule of its own, and refuses to be told
            model, _, _ = resolve_model(replace(self.model, prediction_type=None, timestep_spacing=None))
        found = (model.digest, model.predicts, model.spacing)
        if found != (self.model_sha256, self.model.prediction_type, self.model.timestep_spacing):
            raise JobError(
                f"the model {self.model.source} is not the row's: its files' sha256 is {model.digest} with {found[1]} "
                f"and {found[2]}, the row says {self.model_sha256} with {self.model.prediction_type} and "
                f"{self.model.timestep_spacing}; put the old files back"
            )
        return model

    @property
    def merged_loras(self) -> dict[str, float]:
        """The LoRAs that were part of the weights, with their scales."""
        found = _MERGED.search(self.execution_class)
        return parse_scales(found[1]) if found else {}

    @property
    def execution(self) -> str:
        """How the denoiser was run. Graphs have the bits of eager mode."""
        return "compiled" if _COMPILED.search(self.execution_class) else "eager"

    def spec(self) -> ModelSpec:
        """The model on this machine, checked, with its checker and its way of reading prompts."""
        placed, merged = place_model(self.resolve()), self.merged_loras
        return replace(
            placed,
            loras=tuple(replace(lora, merged=merged.get(lora.name)) for lora in placed.loras),
            safety=self.safety,
            safety_threshold=1.0 if self.safety_threshold is None else self.safety_threshold,
            prompt_syntax=self.prompt_syntax,
            long_prompts=self.long_prompts,
        )

    def load(self, device: str) -> Engine:
        """The engine that makes this picture, and those of all rows that differ in their request alone."""
        import torch

        from latentmill.engine import Engine

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        execution = self.execution if device == "cuda" else "eager"
        return Engine.load(
            self.spec(), device=device, dtype=self.dtype, batch_size=self.batch_size, execution=execution
        )

    def draw(self, engine: Engine) -> Pixels:
        """The picture as it was handed to the encoder: blanked if that was the policy, and watermarked."""
        result = engine.generate([self.request] * self.batch_size)[self.slot]
        finished = None if result.pixels is None else finish_pixels(self.settings, result)
        if finished is None:
            raise JobError(f"the picture cannot be made again: {result.error or 'it is flagged now, and dropped'}")
        return finished.pixels

    @property
    def settings(self) -> JobSpec:
        """What was done to the picture after it was drawn, as a job's settings."""
        return JobSpec(
            prompts=(),
            on_flagged=self.on_flagged,
            watermark=self.watermark,
            watermark_text=self.watermark_text,
        )

    def file(self, pixels: Pixels, model: ResolvedModel) -> bytes:
        """The finished picture's file, by the recipe's own model."""
        return encode_picture(pixels, self.request, model, self.version, self.format_version)


def recipe_of(row: Mapping[str, Any]) -> Recipe:
    """The recipe that a row is. Raises UsageError for a row without a picture, or of a dataset that lacks columns."""
    missing = sorted({field.name for field in own_fields(_FORMAT)} - row.keys())
    if missing:
        raise UsageError(
            f"the row has no column {', '.join(missing)}: it is of an older format, or was cut; use the whole row"
        )
    if row["pixel_sha256"] is None:
        raise UsageError(f"sample {row['sample_id']} has no picture: its status is {row['status']}")
    threads = _THREADS.search(row["execution_class"])
    return Recipe(
        request=GenerationRequest(
            prompt=row["prompt"],
            negative_prompt=row["negative_prompt"],
            seed=row["seed"],
            width=row["width"],
            height=row["height"],
            num_inference_steps=row["num_inference_steps"],
            guidance_scale=_as_typed(row["guidance_scale"]),
            sampler=row["sampler"],
            eta=_as_typed(row["eta"]),
            loras=recorded_scales(row),
            image=_image(row),
            strength=None if row.get("strength") is None else _as_typed(row["strength"]),
        ),
        model=ModelChoice(
            source=row["model"],
            revision=row["revision"],
            tokenizer=row["tokenizer"],
            prediction_type=row["prediction_type"],
            timestep_spacing=row["timestep_spacing"],
            loras=recorded_places(row),
            vae=row.get("vae"),
            preview_decoder=row.get("preview_decoder"),
        ),
        model_sha256=row["model_sha256"],
        prompt_syntax=row["prompt_syntax"],
        long_prompts=row["long_prompts"],
        safety=row["nsfw_checker"],
        safety_threshold=None if row["safety_threshold"] is None else _as_typed(row["safety_threshold"]),
        on_flagged=row["on_flagged"],
        watermark=row["watermark"],
        watermark_text=row["watermark_text"],
        dtype=_dtype(row),
        threads=None if threads is None else int(threads[1]),
        batch_size=row["batch_size"],
        slot=row["batch_slot"],
        execution_class=row["execution_class"],
        version=row["version"],
        format_version=4 if "digital_source_type" in row else _FORMAT,
    )


def _dtype(row: Mapping[str, Any]) -> str:
    """What the model was loaded as. Only one in half precision has anything to make again in full."""
    if row["precision"] == "fp32-retry":
        return "bfloat16" if _BFLOAT16 in row["execution_class"] else "float16"
    return _DTYPES[row["precision"]]


def _image(row: Mapping[str, Any]) -> PlannedImage | None:
    """What the picture started from. It is read when the picture is made again, and must have the row's bytes then."""
    if row.get("init_image") is None:
        return None
    return PlannedImage(
        place=row["init_image"], sha256=row["init_image_sha256"], mask=row["mask"], mask_sha256=row["mask_sha256"]
    )


def _as_typed(stored: float) -> float:
    """The shortest number that a float32 column stores so: 7.3, and not 7.300000190734863."""
    return float(str(np.float32(stored)))
