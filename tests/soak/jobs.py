"""The jobs of a soak: plain, failing and flagged rows in several groups, for the fake model and the shipped one."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Model = Literal["fake", "embedded"]
_COLOURS = ("red", "blue", "green", "orange", "purple", "yellow")
_GROUNDS = ("white", "black", "light blue", "dark blue", "gray")
_SHAPES = ("circle", "triangle", "square", "cross", "ring", "heart", "diamond")


@dataclass(frozen=True, kw_only=True)
class SoakJob:
    """One job: the model, its manifest, and the flags that make it this plan."""

    model: Model
    manifest: Path
    flags: tuple[str, ...]

    def command(self, verb: str, out: str, *more: str) -> list[str]:
        """The command line of a run (or plan) of this job into `out`."""
        program = "latentmill" if self.model == "embedded" else "tests.soak.fake_driver"
        return [sys.executable, "-m", program, verb, str(self.manifest), "--out", out, "--json", *self.flags, *more]


def fake_job(folder: Path, chooser: random.Random, samples: int) -> SoakJob:
    """About half a second for each two samples; some rows fail and some are flagged."""
    rows = [
        {
            "id": f"row {number % 7}",  # ids are data, and may come twice
            "prompt": f"{chooser.choice(_COLOURS)} {number}" + chooser.choice([*[""] * 10, " poison", " nsfw"]),
            "num_inference_steps": chooser.choice([2, 3, 4]),
            "width": chooser.choice([64, 64, 96]),
        }
        for number in range(samples)
    ]
    flags = ["--height", "64", "--chunk-size", "2", "--batch-size", "2", "--seed", str(chooser.randrange(1000))]
    flags += ["--watermark", "none", "--guidance-scale", "4"]
    return _job("fake", folder, rows, flags)


def embedded_job(folder: Path, variant: int, samples: int) -> SoakJob:
    """The shipped model with few steps; the strict watermark makes some rows fail, the low threshold flags some."""
    chooser = random.Random(f"embedded {variant}")
    rows = [
        {
            "prompt": f"a {chooser.choice(['large', 'small'])} {chooser.choice(_COLOURS)} {chooser.choice(_SHAPES)} "
            f"in the center on a {chooser.choice(_GROUNDS)} background",
            "num_inference_steps": chooser.choice([5, 6]),
        }
        for _ in range(samples)
    ]
    flags = ["--chunk-size", "4", "--batch-size", "4", "--threads-per-actor", "1", "--seed", str(variant)]
    flags += ["--watermark", "dwtDct", "--watermark-policy", "require", "--nsfw-threshold", "0.005"]
    return _job("embedded", folder, rows, flags)


def _job(model: Model, folder: Path, rows: list[dict[str, object]], flags: list[str]) -> SoakJob:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "prompts.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SoakJob(model=model, manifest=manifest, flags=tuple(flags))
