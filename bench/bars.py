"""The bars that speed is held to, each with the figure that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.figures import Figure
from bench.results import Result


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A promise: `figure` of a benchmark is at least or at most `limit`, by its median."""

    name: str
    benchmark: str
    figure: str
    limit: float
    at_least: bool

    def find(self, results: Mapping[str, Result]) -> Figure | None:
        """The figure that decides, or None if it has not been measured, or only at a size that means nothing."""
        result = results.get(self.benchmark)
        return None if result is None or result.tiny else result.figure(self.figure)

    def met_by(self, found: Figure) -> bool:
        """Whether the promise is kept."""
        return found.median >= self.limit if self.at_least else found.median <= self.limit


def _least(name: str, benchmark: str, figure: str, limit: float) -> Bar:
    return Bar(name=name, benchmark=benchmark, figure=figure, limit=limit, at_least=True)


def _most(name: str, benchmark: str, figure: str, limit: float) -> Bar:
    return Bar(name=name, benchmark=benchmark, figure=figure, limit=limit, at_least=False)


BARS = (
    _least("whole job against the plain script, 96 pictures", "job-96", "ray-data / ours", 1.25),
    _least("whole job against the plain script, 24 pictures", "job-24", "ray-data / ours", 1.1),
    _least("U-Net against diffusers, batch 8", "engine-embedded", "U-Net: diffusers batched / ours", 1.0),
    _least("VAE against diffusers, batch 8", "engine-embedded", "VAE: diffusers batched / ours", 1.0),
    _least("whole job against the plain script, stand-in", "standin-20", "ray-data-staged / ours", 1.8),
    _most("generating stage idle, stand-in", "standin-20", "ours: generating stage idle", 2.0),
    _most("overhead per picture at 1e5 samples", "overhead-1e5", "time per picture", 3.0),
    _most("Enter to first commit, Ray", "start", "ray: Enter to first commit", 10.0),
    _most("Enter to first commit, inline", "start", "inline: Enter to first commit", 4.0),
    _most("post-processing of a 512 px picture", "postprocess", "512 px: all", 35.0),
    _least("H100 or H200: SD1.5 512 px, 50 steps, compiled", "gpu-sd15-50", "ours, compiled", 5.5),
    _least(
        "H100 or H200: against diffusers, both compiled",
        "gpu-sd15-50",
        "end to end: compiled, diffusers / ours",
        1.2,
    ),
    _least("H100 or H200: SDXL 1024 px, 20 steps, eager", "gpu-sdxl-20", "ours", 1.6),
)
