"""How well a picture fits its prompt: the cosine of their embeddings by a CLIP model (arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
from transformers.utils.logging import disable_progress_bar

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.models.cache import fetch_newest, is_url, listing_digest
from latentmill.jobs.models.digests import file_digests
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.store.urls import display_url

_READ = (".json", ".safetensors", ".txt")
"""What is read of a model's folder: no file that could run code."""


class Clip:
    """`clip_score` in [-1, 1]. A prompt is cut where the model's text encoder ends."""

    name = "clip"
    columns = {"clip_score": "float32"}  # noqa: RUF012 - a constant of the class
    on_device = True

    def __init__(self, folder: Path, device: str) -> None:
        files = {name: folder / name for name in _names(folder)}
        self.version = f"1, model {listing_digest(file_digests(files))[:16]}"
        self._device = device
        disable_progress_bar()  # a line of its own among ours
        model, report = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        lacking = sorted(report["missing_keys"])
        if lacking:  # transformers would draw them at random
            raise ValueError(f"its weights lack {len(lacking)} tensors, first {lacking[0]}")
        self._model: Any = model
        self._model.to(device).eval().requires_grad_(requires_grad=False)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._processor: Any = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)

    @classmethod
    def load(cls, spec: ScoreSpec) -> Clip:
        """The model at `spec.clip_model`. Raises UsageError if it is none."""
        place = spec.clip_model
        if place is None:
            raise UsageError("the scorer clip needs a model; give --clip-model, a folder or a URL of one")
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            folder = fetch_newest(place, _names) if is_url(place) else Path(place)
            if not (folder / "config.json").is_file():
                raise OSError("there is no config.json")
            return cls(folder, device)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:  # whatever transformers raises
            raise UsageError(
                f"clip_model {shorten(display_url(place))} is no CLIP model that can be loaded on {device}: "
                f"{' '.join(str(error).split())[:200]}; give a folder with config.json, model.safetensors, the "
                f"tokenizer and preprocessor_config.json"
            ) from error

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, list[float]]:
        """The cosine of each picture with its prompt."""
        length = self._model.config.text_config.max_position_embeddings
        # one length for all: a prompt's bits do not depend on its neighbours
        words = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        images = self._processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        with torch.inference_mode():
            found = self._model(**words.to(self._device), **images.to(self._device))
            cosines = torch.nn.functional.cosine_similarity(found.text_embeds, found.image_embeds)
        return {"clip_score": cosines.float().cpu().tolist()}


def _names(folder: Path) -> Iterable[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _READ and path.is_file())
