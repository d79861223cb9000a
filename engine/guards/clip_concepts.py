"""The checker of the original script: CLIP's embedding of a picture against those of unsafe concepts.

The rule and its rounding are those of the published StableDiffusionSafetyChecker. The checker's own folder has the
weights, the thresholds and the settings of the pre-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from latentmill.engine.loading.checkpoint import open_weights
from latentmill.engine.loading.clip_config import SIDE_LIMIT, clip_vision_config
from latentmill.engine.loading.config import WIDTH_LIMIT
from latentmill.engine.loading.fields import Fields
from latentmill.engine.loading.files import read_json, shown
from latentmill.engine.loading.weights import place_constants
from latentmill.engine.types import EngineError, ModelSpec, Pixels, SafetyVerdict

_PROCESSOR_FILE = "feature_extractor/preprocessor_config.json"
_CONCEPTS, _SPECIAL = 17, 3
_SPECIAL_ADJUSTMENT = 0.01


class _ConceptModel(nn.Module):
    """CLIP's image encoder and the concepts; attribute names are the checkpoint's keys."""

    def __init__(self, config: CLIPVisionConfig, width: int) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(_CONCEPTS, width))
        self.special_care_embeds = nn.Parameter(torch.ones(_SPECIAL, width))
        self.concept_embeds_weights = nn.Parameter(torch.ones(_CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(_SPECIAL))

    def similarities(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """`(n, 3, side, side)` -> cosines with the special-care concepts `(n, 3)` and with the concepts `(n, 17)`."""
        embeds = F.normalize(self.visual_projection(self.vision_model(pixel_values).pooler_output))
        special = F.normalize(self.special_care_embeds)
        concepts = F.normalize(self.concept_embeds)
        return (embeds @ special.T).float(), (embeds @ concepts.T).float()


class ClipConcepts:
    """`clip-concepts`: a `safety_checker/` folder with its image processor (`feature_extractor/` beside it).

    Flags a picture exactly where the published class does, and also where a score is not a number.
    """

    def __init__(self, model_folder: Path, device: torch.device) -> None:
        folder = model_folder / "safety_checker"
        self._device = device
        self._processor = CLIPImageProcessorPil(**_processor_settings(model_folder))
        self._model = _load(folder).to(device).eval().requires_grad_(requires_grad=False)
        self._special_thresholds = self._model.special_care_embeds_weights.tolist()
        self._thresholds = self._model.concept_embeds_weights.tolist()

    def check(self, pixels: Pixels) -> SafetyVerdict:
        """Judge `(h, w, 3) uint8` RGB; the score is the highest of the 17, above 0 for a flagged picture."""
        inputs = self._processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            special, concepts = self._model.similarities(inputs.to(self._device))
        score = concept_score(
            special[0].cpu().numpy(), concepts[0].cpu().numpy(), self._special_thresholds, self._thresholds
        )
        # A score that is not a number compares as False, and must be flagged.
        return SafetyVerdict(checker="clip-concepts", score=score, flagged=not score <= 0)


def load(spec: ModelSpec, folder: Path, device: torch.device) -> ClipConcepts:  # noqa: ARG001 - as all are loaded
    """The checker in a model's folder. Raises EngineError for files that are missing or do not fit."""
    return ClipConcepts(folder, device)


def concept_score(
    special: NDArray[np.float32],
    concepts: NDArray[np.float32],
    special_thresholds: Sequence[float],
    thresholds: Sequence[float],
) -> float:
    """The highest concept score: cosine less threshold, rounded to 3 places; above 0 is unsafe.

    A hit on a special-care concept makes every later comparison stricter by 0.01. NaN anywhere makes the score NaN.
    """
    if not (np.isfinite(special).all() and np.isfinite(concepts).all()):
        return math.nan
    adjustment = 0.0
    for cosine, threshold in zip(special, special_thresholds, strict=True):
        if round(cosine - threshold + adjustment, 3) > 0:
            adjustment = _SPECIAL_ADJUSTMENT
    return float(
        max(round(cosine - threshold + adjustment, 3) for cosine, threshold in zip(concepts, thresholds, strict=True))
    )


def _processor_settings(model_folder: Path) -> dict[str, object]:
    """The image processor's own settings; without the file, those of CLIP ViT-L/14, which every published one has."""
    path = model_folder / _PROCESSOR_FILE
    if not path.is_file():
        return {}
    settings = read_json(path)
    fields = Fields(settings, str(path))
    found: dict[str, object] = {
        name: _sides(settings[name], name, path) for name in ("size", "crop_size") if name in settings
    }
    if "resample" in settings:
        found["resample"] = fields.whole("resample", 3, max(Image.Resampling), least=0)
    for name in ("image_mean", "image_std"):
        if name in settings:
            numbers = fields.numbers(name, 1.0, length=3)
            if numbers is None or len(numbers) != 3 or (name == "image_std" and 0 in numbers):
                raise fields.refusal(name, "three numbers, by which pixels of three channels can be scaled")
            found[name] = list(numbers)
    return found


def _sides(value: object, name: str, path: Path) -> dict[str, int] | int:
    """A size in pixels: one number, or a mapping of sides to numbers."""
    sides = value if isinstance(value, dict) else {name: value}
    fields = Fields(sides, f"{path}, {name}")
    checked = {side: fields.whole(side, None, SIDE_LIMIT) for side in sides}
    return checked if isinstance(value, dict) else checked[name]


def _load(folder: Path) -> _ConceptModel:
    path = folder / "model.safetensors"
    config = read_json(folder / "config.json")
    vision = config.get("vision_config")
    where = str(folder / "config.json")
    with torch.device("meta"):
        model = _ConceptModel(
            CLIPVisionConfig(**clip_vision_config(vision if isinstance(vision, dict) else {}, where)),
            Fields(config, where).whole("projection_dim", 512, WIDTH_LIMIT),
        )
    if not path.exists():
        raise EngineError(
            f"{path} is missing: the model names a safety checker without weights; add the file, or choose open-nsfw"
        )
    file = open_weights(path)
    # The published file nests the encoder twice and stores position numbers; later versions do neither.
    keys = {
        key.replace("vision_model.vision_model.", "vision_model."): key
        for key in file.shapes
        if not key.endswith("position_ids")
    }
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: file.shapes[key] for name, key in keys.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise EngineError(
            f"{path} does not fit its config.json: {len(wrong)} weights are missing, unexpected or of another shape "
            f"(first: {shown(wrong[0])}); copy both files again"
        )
    model.load_state_dict({name: file.read(key).float() for name, key in keys.items()}, assign=True)
    place_constants(model, torch.device("cpu"))
    return model
