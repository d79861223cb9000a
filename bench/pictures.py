"""Whether two programs made the same pictures, and the manifest that both read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from bench.machine import ROOT

Pixels = NDArray[np.uint8]

NEAR = 2
"""Levels of 255 by which two libraries' rounding may differ."""


def write_prompts(path: Path, count: int) -> Path:
    """A manifest of so many rows with an id, a prompt of the sample's in turn, and a seed of its own."""
    lines = (ROOT / "configs/prompts/sample.txt").read_text().splitlines()
    prompts = [line for line in lines if line and not line.startswith("#")]
    columns = {
        "id": [f"p{number:07d}" for number in range(count)],
        "prompt": [prompts[number % len(prompts)] for number in range(count)],
        "seed": [42 + number for number in range(count)],
    }
    pq.write_table(pa.table(columns), path)
    return path


def rows_of(out: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an output's dataset, ours or a peer's."""
    parts = sorted(path for path in (out / "dataset").glob("*.parquet") if path.stat().st_size)
    return [row for part in parts for row in pq.read_table(part, columns=list(columns)).to_pylist()]


def differences(left: Sequence[Pixels], right: Sequence[Pixels]) -> dict[str, float]:
    """How far the pictures of two programs are apart, over all of them."""
    apart = [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in zip(left, right, strict=True)]
    return {
        "pictures": len(apart),
        "mean difference": float(np.mean([each.mean() for each in apart])),
        "greatest mean difference of a picture": float(max(each.mean() for each in apart)),
        f"pixels within {NEAR} levels": float(np.mean([(each <= NEAR).mean() for each in apart])),
    }


def say(what: str, apart: dict[str, float]) -> str:
    """The differences as a sentence."""
    return (
        f"{what}: {apart['pictures']:.0f} pictures, {100 * apart[f'pixels within {NEAR} levels']:.2f} % of all values "
        f"within {NEAR} levels of 255, mean difference {apart['mean difference']:.3f}, "
        f"of the worst picture {apart['greatest mean difference of a picture']:.3f}"
    )


def output_differences(ours: Path, peer: Path) -> dict[str, float]:
    """The pictures of our output and of a peer's, by the manifest's ids."""
    mine = {row["row_id"]: row["image"] for row in rows_of(ours, ["row_id", "image"])}
    theirs = {row["id"]: row["image"] for row in rows_of(peer, ["id", "image"])}
    if mine.keys() != theirs.keys():
        raise ValueError(f"{len(mine)} rows of ours, {len(theirs)} of the peer's: not the same ids")
    names = sorted(mine)
    return differences([_load(ours / mine[name]) for name in names], [_load(peer / theirs[name]) for name in names])


def _load(path: Path) -> Pixels:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.asarray(image.convert("RGB"))
