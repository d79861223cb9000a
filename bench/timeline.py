"""A run as a picture: a row for each process, how busy it was, when it generated, and when files were committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from bench.tracing import Span

_LEFT, _WIDTH, _ROW, _TOP = 330, 900, 18, 48
_LEAST_CPU = 0.15
"""Processes that used less of the processor are only counted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at a moment of the run, in seconds since Enter."""

    at: float
    pid: int
    title: str
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened, in seconds since the epoch."""

    at: float
    name: str


def draw(title: str, samples: Sequence[Sample], spans: Sequence[Span], marks: Sequence[Mark], began: float) -> str:
    """The SVG. Grey is processor time, dark where a core was full; blue is generating; lines are commits."""
    by_pid: dict[int, list[Sample]] = {}
    for sample in samples:
        by_pid.setdefault(sample.pid, []).append(sample)
    rows = [each for each in by_pid.values() if each[-1].cpu_seconds >= _LEAST_CPU]
    end = max([sample.at for sample in samples] + [mark.at - began for mark in marks])
    scale = _WIDTH / end
    height = _TOP + _ROW * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="16" font-size="13">{escape(title)}</text>',
        f'<text x="8" y="32">{len(by_pid) - len(rows)} processes of less than {_LEAST_CPU} s are left out</text>',
    ]
    for number, row in enumerate(rows):
        parts += _row(row, [span for span in spans if span.pid == row[0].pid], began, scale, _TOP + _ROW * number)
    foot = _TOP + _ROW * len(rows)
    for mark in marks:
        x = _LEFT + (mark.at - began) * scale
        colour = {"commit": "#c33", "published": "#393"}.get(mark.name, "#963")
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{foot}" stroke="{colour}"/>')
        if mark.name != "commit":
            parts.append(f'<text x="{x + 2:.1f}" y="{_TOP - 10}" fill="{colour}">{mark.name}</text>')
    for second in range(0, int(end) + 1, max(1, int(end) // 15)):
        parts.append(f'<text x="{_LEFT + second * scale:.1f}" y="{foot + 14}">{second} s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(row: Sequence[Sample], spans: Sequence[Span], began: float, scale: float, y: int) -> list[str]:
    # Ray's workers call themselves idle between their tasks.
    titles = [sample.title for sample in row if "IDLE" not in sample.title] or [row[-1].title]
    words = [Path(word).name if word.startswith("/") else word for word in titles[-1].split()]
    label = f"{' '.join(words)[:44]} {row[-1].cpu_seconds:.1f} s"
    parts = [f'<text x="8" y="{y + 12}">{escape(label)}</text>']
    for before, after in pairwise(row):
        share = min(1.0, (after.cpu_seconds - before.cpu_seconds) / max(after.at - before.at, 1e-3))
        if share > 0.02:
            x, width = _LEFT + before.at * scale, (after.at - before.at) * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 4}" '
                f'fill="#444" fill-opacity="{share:.2f}"/>'
            )
    for span in spans:
        x, width = _LEFT + (span.began - began) * scale, (span.ended - span.began) * scale
        parts.append(f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="5" fill="#36c"/>')
    return parts
