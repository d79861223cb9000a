"""The checker of the original script: CLIP's image embedding against the embeddings of unsafe concepts.

The rule and its rounding are those of the published StableDiffusionSafetyChecker; the checker's own folder brings the
weights, thresholds among them, and the pre-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPVisionModel

from latentmill.engine.loading.describe import read_json
from latentmill.engine.types import EngineError, Pixels, SafetyVerdict

_CONCEPTS, _SPECIAL = 17, 3
_SPECIAL_ADJUSTMENT = 0.01


class _ConceptModel(nn.Module):
    """CLIP's vision tower with the concepts beside it; attribute names are the checkpoint's keys."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
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
        # Written so that a score that is not a number is flagged.
        return SafetyVerdict(checker="clip-concepts", score=score, flagged=not score <= 0)


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
    path = model_folder / "feature_extractor" / "preprocessor_config.json"
    if not path.is_file():
        return {}
    settings = read_json(path)
    return {
        key: settings[key] for key in ("size", "crop_size", "resample", "image_mean", "image_std") if key in settings
    }


def _load(folder: Path) -> _ConceptModel:
    model = _ConceptModel(CLIPConfig.from_dict(read_json(folder / "config.json")))
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
        # The published file nests the tower twice and stores position numbers; later versions do neither.
        model.load_state_dict(
            {
                key.replace("vision_model.vision_model.", "vision_model."): tensor.float()
                for key, tensor in tensors.items()
                if not key.endswith("position_ids")
            }
        )
    except FileNotFoundError:
        raise EngineError(
            f"{path} is missing: the model names a safety checker without weights; add the file, or choose open-nsfw"
        ) from None
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{path} does not fit its config.json or cannot be read: {reason}") from error
    return model
