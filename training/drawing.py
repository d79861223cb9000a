"""How the recipe draws with a model: for the evaluation, and for what LoRAs and fine-tunes learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentmill.engine import Engine, GenerationRequest, ModelSpec
from latentmill.engine.types import LoraSpec
from training import devices
from training.scenes import IMAGE_SIZE, Pixels

STEPS, GUIDANCE, BATCH = 20, 2.0, 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the pictures are made. `loras` are files by the names that they have beside the model, each at scale 1."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    sampler: str = "ddim"
    device: str = field(default_factory=lambda: devices.device().type)
    loras: Mapping[str, Path] = field(default_factory=dict)

    def load(self, model: Path, batch_size: int = BATCH) -> Engine:
        """The model without its safety checker: these pictures are judged or learned, not published."""
        loras = tuple(LoraSpec(name=name, path=str(path)) for name, path in self.loras.items())
        spec = ModelSpec(model=str(model), safety="none", loras=loras)
        dtype = "float32" if self.device == "cpu" else "float16"
        return Engine.load(spec, device=self.device, dtype=dtype, batch_size=batch_size)

    def draw(
        self, engine: Engine, prompts: Sequence[str], first_seed: int, negative: Sequence[str] | None = None
    ) -> list[Pixels]:
        """One picture per prompt, seeds counting up from `first_seed`. Raises RuntimeError if one fails."""
        requests = [
            GenerationRequest(
                prompt=prompt,
                negative_prompt=negative[index] if negative else "",
                seed=first_seed + index,
                width=IMAGE_SIZE,
                height=IMAGE_SIZE,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                sampler=self.sampler,
                loras=tuple((name, 1.0) for name in self.loras),
            )
            for index, prompt in enumerate(prompts)
        ]
        pictures = []
        for request, result in zip(requests, engine.generate(requests), strict=True):
            if result.pixels is None:
                raise RuntimeError(f"{request.prompt!r} with seed {request.seed} failed: {result.error}")
            pictures.append(result.pixels)
        return pictures
