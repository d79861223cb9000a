"""What a traced run says: when each process generated, how long the stage idled, and how long the tail was."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """One batch of one process, in seconds since the epoch."""

    pid: int
    pictures: int
    began: float
    ended: float


def read_trace(path: Path) -> list[Span]:
    """All batches, in the order in which they ended."""
    spans = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        _, pid, pictures, began, ended = line.split()
        spans.append(Span(int(pid), int(pictures), float(began), float(ended)))
    return spans


def pictures_made(spans: list[Span]) -> int:
    """Pictures that were generated, whatever became of them."""
    return sum(span.pictures for span in spans)


def idle_percent(spans: list[Span]) -> float:
    """How much of the time between a process's first and last batch it did not generate, over all processes."""
    by_process: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_process[span.pid].append(span)
    whole = sum(max(s.ended for s in each) - min(s.began for s in each) for each in by_process.values())
    busy = sum(span.ended - span.began for span in spans)
    return 100 * (1 - busy / whole) if whole else 0.0


def tail_seconds(spans: list[Span], end: float) -> float:
    """From the last generated picture to the end of the command."""
    return end - max(span.ended for span in spans)
