"""The verb `regenerate`: samples by their numbers, made once more into a folder of their own, and a report of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.outputs.redraw import Drawing, Redrawer, Regenerated
from latentmill.jobs.outputs.rows import rows_of
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import allowed_filesystem, refuse_inside

_SAMPLES = re.compile(r"(\d{1,19})(?::(\d{1,19}))?", re.ASCII)
_MOST_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerateReport:
    """What became of each sample, and what it was drawn on."""

    out: str
    destination: str
    execution_classes: tuple[str, ...]
    tolerance: float
    samples: tuple[Regenerated, ...]

    @property
    def exit_code(self) -> int:
        """0 if every sample came out as the bulk run made it, or close enough on another execution class."""
        return 0 if all(sample.good for sample in self.samples) else 1

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": self.exit_code}


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerateProgress:
    """How many samples are made and compared."""

    phase: str
    done: int
    total: int


def regenerate(
    out_url: str,
    samples: Sequence[int],
    *,
    destination: str | None = None,
    drawing: Drawing | None = None,
    on_progress: Callable[[RegenerateProgress], None] = lambda _: None,
) -> RegenerateReport:
    """Afterwards each sample's picture lies in the destination, made again from its row; the output is only read.

    The destination is a folder beside the output unless it is named. Raises UsageError for samples that the output
    lacks, and for a destination inside it.
    """
    job, drawing = open_job(out_url), drawing or Drawing()
    target = Storage.open(_destination(out_url, destination))
    rows = rows_of(job, samples)
    redrawer = Redrawer(job, drawing, target)
    found = {}
    for sample, regenerated in redrawer.samples(rows):
        found[sample] = regenerated
        on_progress(RegenerateProgress(phase="drawing", done=len(found), total=len(rows)))
    return RegenerateReport(
        out=job.storage.url,
        destination=target.url,
        execution_classes=tuple(sorted(redrawer.execution_classes)),
        tolerance=drawing.tolerance,
        samples=tuple(found[sample] for sample in sorted(found)),
    )


def parse_samples(texts: Sequence[str]) -> list[int]:
    """Numbers of samples as a flag names them: `17`, `00000017`, `3,8`, or `20:24` for 20 to 23. Raises UsageError."""
    samples: dict[int, None] = {}
    for item in ",".join(texts).split(","):
        found = _SAMPLES.fullmatch(item.strip())
        if found is None:
            raise UsageError(f"--sample {shorten(item)} is no sample; write its number, several as 3,8 or as 20:24")
        first, end = int(found[1]), int(found[2] or int(found[1]) + 1)
        if not 0 < end - first <= _MOST_SAMPLES - len(samples):
            raise UsageError(f"--sample {shorten(item)} names none or more than {_MOST_SAMPLES:,} samples; name fewer")
        samples |= dict.fromkeys(range(first, end))
    return list(samples)


def _destination(out_url: str, named: str | None) -> str:
    if named is None:
        fs, root = allowed_filesystem(out_url)
        local = "file" in fs.protocol if isinstance(fs.protocol, tuple) else fs.protocol == "file"
        return f"{root if local else out_url.rstrip('/')}-regenerated"
    refuse_inside(named, out_url)
    return named
