"""What a plan would do, in numbers: for `latentmill plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.engine import count_passes, passes
from latentmill.jobs.manifests.fields import Value, shorten
from latentmill.jobs.manifests.manifest import Manifest, Suspect
from latentmill.jobs.plans.grid import Grid, Group, Section

PNG_BYTES_PER_PIXEL = 1.5
"""An estimate: half of the raw bytes."""

MAX_SUSPECTS_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectNote:
    """One rejected row, for display; its text is untrusted."""

    source: str
    source_row: int
    row_number: int
    reason: str
    excerpt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupNote:
    """One group of samples that share shape and loop."""

    width: int
    height: int
    num_inference_steps: int
    sampler: str
    guided: bool
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNote:
    """One model of an axis, and how many samples it draws."""

    name: str
    family: str
    source: str
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """About how long a job will take: `seconds` of one model at work, `elapsed` where `models` work at once.

    `source` says where the rate comes from. `cost` is that of the GPU hours, None without a price.
    """

    seconds: float
    elapsed: float
    models: int
    source: str
    cost: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSummary:
    """A plan in numbers. `models` are those of an axis, in the order in which every actor loads them, each once.

    `tokens_over_limit` counts rows whose prompt or negative prompt has more than `token_limit` tokens, among the first
    `tokens_checked`; `long_prompts` says how they are handled. The limit is None if it is unknown.
    `parameters` holds the defaults; rows override those of `row_parameters`, the sweep those of `axes`, of which those
    in each group of `zips` vary together. `loras` are the scales of LoRAs that rows, prompts and axes do not give.
    `passes` counts, about, how often the denoiser runs at a full batch; `padding_waste` is the share of its slots that
    do nothing for any sample. `duplicate_ids` counts rows with the id of an earlier row, among the first
    `ids_compared`.
    """

    plan_hash: str
    out: str
    sources: tuple[str, ...]
    model: str
    model_family: str
    models: tuple[ModelNote, ...]
    loras: dict[str, float]
    device: str
    dtype: str
    threads_per_actor: int
    parameters: dict[str, Value]
    axes: dict[str, list[Value]]
    zips: tuple[tuple[str, ...], ...]
    template: str
    row_parameters: tuple[str, ...]
    rows: int
    rejected_rows: int
    first_rejects: tuple[RejectNote, ...]
    samples: int
    groups: tuple[GroupNote, ...]
    chunks: int
    chunk_size: int
    passes: int
    batch_size: int
    padding_waste: float
    prompt_syntax: str
    long_prompts: str
    token_limit: int | None
    tokens_over_limit: int
    tokens_checked: int
    bytes_expected: int
    safety: str
    on_flagged: str
    watermark: str
    watermark_policy: str
    carried_columns: tuple[str, ...]
    duplicate_ids: int
    ids_compared: int
    notes: tuple[str, ...]
    estimate: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def suspect_note(suspect: Suspect) -> str:
    """Why a carried column may be a mistake, and the remedy."""
    likeness = "stands for" if suspect.is_alias else "is close to"
    if suspect.beside:
        likeness, remedy = (
            f"{likeness} {suspect.parameter}, which the file has too;",
            "drop it, or give it another name",
        )
    elif suspect.is_alias:
        likeness, remedy = f"{likeness} {suspect.parameter};", "say --accept-aliases, or rename it"
    else:
        likeness, remedy = f"{likeness} {suspect.parameter};", "rename it if you meant that"
    column = f"column {shorten(suspect.column)} of {suspect.source}"
    return f"{column} {likeness} it is carried and changes no picture: {remedy}"


def manifest_notes(
    manifest: Manifest, duplicate_ids: int, ids_compared: int, n_rows: int, *, is_sample: bool
) -> tuple[str, ...]:
    """What a user should know about an accepted manifest, one line each."""
    suspects = manifest.suspects
    notes = [suspect_note(suspect) for suspect in suspects[:MAX_SUSPECTS_SHOWN]]
    if len(suspects) > MAX_SUSPECTS_SHOWN:
        notes.append(
            f"{len(suspects) - MAX_SUSPECTS_SHOWN:,} more columns are carried, though they look like parameters"
        )
    if duplicate_ids:
        among = f" of the first {ids_compared:,}" if ids_compared < n_rows else f" of {n_rows:,}"
        notes.append(
            f"duplicate ids: {duplicate_ids:,}{among} rows have the id of an earlier one; each is drawn anyway"
        )
    if is_sample:
        notes.append(f"these are the sample prompts, {manifest.sources[0].path}; name a file to draw others")
    return tuple(notes)


def describe_group(group: Group) -> GroupNote:
    """A group as it is shown."""
    width, height, guided, steps, sampler = group.key
    return GroupNote(
        width=width,
        height=height,
        num_inference_steps=steps,
        sampler=sampler,
        guided=guided,
        samples=group.n_samples,
    )


def count_denoising(grid: Grid, batch_size: int) -> tuple[int, float]:
    """How often the denoiser runs at a full batch, and the share of its slots that do nothing for any sample."""
    total = sum(section_passes(section, grid.chunk_size, batch_size) for section in grid.sections)
    useful = sum(group.n_samples * passes(group.loop) for group in grid.groups)
    return total, 1 - useful / (total * batch_size)


def section_passes(section: Section, size: int, batch_size: int) -> int:
    """How often the denoiser runs for a section at a full batch.

    Chunks of one loop are counted by arithmetic; those where groups meet, and the last one, are looked at.
    """
    total = 0
    looked_at = {section.n_samples // size} if section.n_samples % size else set()
    for group in section.groups:
        whole = (group.first + group.n_samples) // size - -(-group.first // size)
        total += max(whole, 0) * count_passes([group.loop] * size, batch_size)
        if group.first % size:
            looked_at.add(group.first // size)
    for number in looked_at:
        start = number * size
        pieces = section.cut(start, min(start + size, section.n_samples))
        loops = [group.loop for group, first, last in pieces for _ in range(first, last)]
        total += count_passes(loops, batch_size)
    return total


def expected_bytes(groups: Sequence[GroupNote]) -> int:
    """About how many bytes the pictures will take."""
    return int(sum(group.samples * group.width * group.height for group in groups) * PNG_BYTES_PER_PIXEL)
