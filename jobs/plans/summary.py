"""What a plan would do, in numbers: for `latentmill plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.jobs.manifests.fields import Value
from latentmill.jobs.plans.grid import Group

PNG_BYTES_PER_PIXEL = 1.5
"""A rough figure for pictures of this kind: half of the raw bytes."""


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
    """One group of samples that share a loop."""

    width: int
    height: int
    num_inference_steps: int
    sampler: str
    guided: bool
    samples: int
    chunks: int
    batches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSummary:
    """A plan in numbers.

    `tokens_over_limit` counts rows whose prompt or negative prompt has more than `token_limit` tokens, among the first
    `tokens_checked`; `long_prompts` says what becomes of them. The limit is None where the model's is not known.
    """

    plan_hash: str
    out: str
    sources: tuple[str, ...]
    model: str
    model_family: str
    device: str
    dtype: str
    threads_per_actor: int
    parameters: dict[str, Value]
    axes: dict[str, list[Value]]
    rows: int
    rejected_rows: int
    first_rejects: tuple[RejectNote, ...]
    samples: int
    groups: tuple[GroupNote, ...]
    chunks: int
    chunk_size: int
    batches: int
    batch_size: int
    padded_slots: int
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

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def describe_group(group: Group, chunk_size: int, batch_size: int) -> GroupNote:
    """A group with its batches: each chunk is padded to whole batches."""
    width, height, steps, sampler, guided = group.key
    last = group.n_samples - (group.n_chunks - 1) * chunk_size
    batches = (group.n_chunks - 1) * -(-chunk_size // batch_size) + -(-last // batch_size)
    return GroupNote(
        width=width,
        height=height,
        num_inference_steps=steps,
        sampler=sampler,
        guided=guided,
        samples=group.n_samples,
        chunks=group.n_chunks,
        batches=batches,
    )


def expected_bytes(groups: Sequence[GroupNote]) -> int:
    """About how many bytes the pictures will take."""
    return int(sum(group.samples * group.width * group.height for group in groups) * PNG_BYTES_PER_PIXEL)
