"""A published row as a recipe: all it takes to make its picture again, wherever the row comes from.

Only the row is read: rows of several jobs may lie in one dataset, and their outputs may be gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from latentmill.engine import GenerationRequest, GenerationResult, ModelSpec
from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.ledger.pictures import blank
from latentmill.jobs.manifests.images import PlannedImage
from latentmill.jobs.models.choice import ModelChoice, resolve_model
from latentmill.jobs.models.place import place_model
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.columns import own_fields

if TYPE_CHECKING:
    from latentmill.engine import Engine

DTYPES = {"fp32": "float32", "fp16": "float16", "fp32-retry": "float16"}
"""What the model was loaded as, by the precision of a row: only a half-precision model has anything to retry."""

_FORMAT = 3
"""The first format whose rows have all that it takes."""

_THREADS = re.compile(r", (\d+) threads, ")


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

    def spec(self) -> ModelSpec:
        """The model on this machine, checked, with its checker and its way of reading prompts."""
        return replace(
            place_model(self.resolve()),
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
        return Engine.load(self.spec(), device=device, dtype=self.dtype, batch_size=self.batch_size)

    def draw(self, engine: Engine) -> Pixels:
        """The picture as it was handed to the encoder: blanked if that was the policy, and watermarked."""
        result = engine.generate([self.request] * self.batch_size)[self.slot]
        if result.pixels is None:
            raise JobError(f"the picture cannot be made again: {result.error}")
        return self._finished(result, result.pixels)

    def _finished(self, result: GenerationResult, pixels: Pixels) -> Pixels:
        if result.status == "flagged" and self.on_flagged == "blank":
            pixels = blank(pixels)
        if self.watermark == "none":
            return pixels
        from latentmill.engine import embed_watermark

        return embed_watermark(pixels, self.watermark_text, self.watermark)


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
            image=_image(row),
            strength=None if row.get("strength") is None else _as_typed(row["strength"]),
        ),
        model=ModelChoice(
            source=row["model"],
            revision=row["revision"],
            tokenizer=row["tokenizer"],
            prediction_type=row["prediction_type"],
            timestep_spacing=row["timestep_spacing"],
        ),
        model_sha256=row["model_sha256"],
        prompt_syntax=row["prompt_syntax"],
        long_prompts=row["long_prompts"],
        safety=row["nsfw_checker"],
        safety_threshold=None if row["safety_threshold"] is None else _as_typed(row["safety_threshold"]),
        on_flagged=row["on_flagged"],
        watermark=row["watermark"],
        watermark_text=row["watermark_text"],
        dtype=DTYPES[row["precision"]],
        threads=None if threads is None else int(threads[1]),
        batch_size=row["batch_size"],
        slot=row["batch_slot"],
        execution_class=row["execution_class"],
    )


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
