"""The curves of both stages as one picture, drawn from what their training wrote down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

STAGES = {  # the stage's file in the work folder -> the figures that are drawn
    "autoencoder.jsonl": ("psnr", "l1", "perceptual", "critic"),
    "diffusion.jsonl": ("loss",),
}
PANEL = (420, 220)
MARGIN = 40
SMOOTHED = 9  # neighbours averaged for the line


def _read(path: Path) -> list[dict[str, float]]:
    """The rows of one stage in order; what a kill cut off, and what was done twice after it, counts once."""
    rows: dict[float, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line before a kill
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _panel(title: str, minutes: Sequence[float], values: Sequence[float]) -> Image.Image:
    image = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN, MARGIN // 2, PANEL[0] - 10, PANEL[1] - MARGIN // 2
    draw.rectangle((left, top, right, bottom), outline=(200, 200, 200))
    draw.text((left, 4), title, fill="black")
    found = np.asarray(values)
    low, high = float(np.percentile(found, 1)), float(np.percentile(found, 99))
    span, last = max(high - low, 1e-9), max(minutes[-1], 1e-9)

    def places(series: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[tuple[float, float]]:
        heights = np.clip((series - low) / span, 0.0, 1.0)
        return [
            (left + (right - left) * minute / last, bottom - (bottom - top) * float(height))
            for minute, height in zip(minutes, heights, strict=True)
        ]

    for x, y in places(found):
        draw.point((x, y), fill=(150, 180, 220))
    reach = min(SMOOTHED, len(found))
    padded = np.pad(found, (reach // 2, reach - 1 - reach // 2), mode="edge")
    draw.line(places(np.convolve(padded, np.full(reach, 1 / reach), mode="valid")), fill=(20, 60, 140), width=2)
    draw.text((2, top), f"{high:.3g}", fill="black")
    draw.text((2, bottom - 10), f"{low:.3g}", fill="black")
    draw.text((right - 60, bottom + 4), f"{last:.0f} min", fill="black")
    return image


def draw(work: Path, path: Path) -> None:
    """Write the curves of the stages in `work` to `path`: minutes of each core across, a panel for each figure."""
    panels = []
    for name, figures in STAGES.items():
        rows = _read(work / name) if (work / name).is_file() else []
        for figure in figures:
            known = [row for row in rows if figure in row]
            if known:
                title = f"{name.removesuffix('.jsonl')}: {figure}"
                panels.append(_panel(title, [row["minutes"] for row in known], [row[figure] for row in known]))
    if not panels:
        raise RuntimeError(f"{work} holds no curves yet: they begin with the first training step")
    columns = 2
    sheet = Image.new("RGB", (PANEL[0] * columns, PANEL[1] * -(-len(panels) // columns)), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * PANEL[0], index // columns * PANEL[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
