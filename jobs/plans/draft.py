"""A plan before it is published: its snapshot is spooled on this machine, and its document and summary are known."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.jobs.code import own_code, version_of
from latentmill.jobs.manifests.axes import Axis
from latentmill.jobs.manifests.manifest import Manifest
from latentmill.jobs.manifests.row_loras import RowLoras
from latentmill.jobs.manifests.tokens import TokenCounter
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.columns import formats
from latentmill.jobs.plans.grid import Grid
from latentmill.jobs.plans.ids import IdCounter
from latentmill.jobs.plans.planned import Plan, fingerprint, part_path
from latentmill.jobs.plans.prompt_notes import PromptNotes
from latentmill.jobs.plans.row_classes import class_fields, decode_class
from latentmill.jobs.plans.snapshot import RejectWriter, SnapshotWriter
from latentmill.jobs.plans.summary import (
    ModelNote,
    PlanSummary,
    RejectNote,
    count_denoising,
    describe_group,
    expected_bytes,
    manifest_notes,
)
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.urls import display_url

if TYPE_CHECKING:
    from latentmill.jobs.store.storage import Storage

MAX_PROMPTS_TOKENIZED = 100_000
_TOKENIZER_BATCH = 1_000
_VERSIONED = ("latentmill", "torch", "transformers", "pyarrow")


@dataclass(frozen=True)
class DraftPlan:
    """A plan on this machine only: its snapshot is in a temporary folder until the draft is closed."""

    spec: JobSpec
    models: tuple[ResolvedModel, ...]
    manifest: Manifest
    identity: Mapping[str, Any]
    snapshot: SnapshotWriter
    digest: str
    rejects: RejectWriter
    axes: tuple[Axis, ...]
    grid: Grid
    ids: IdCounter
    tokens: TokenCounter
    prompt_notes: PromptNotes
    model_notes: tuple[str, ...]
    wildcards: bytes | None
    loras: RowLoras
    spool: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the spool."""
        self.spool.close()

    @property
    def n_rows(self) -> int:
        """Valid rows."""
        return sum(part.rows for part in self.snapshot.parts)

    @cached_property
    def plan_hash(self) -> str:
        """The fingerprint of all that can change a pixel or a row."""
        return fingerprint(self.identity)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the manifest, one line each; texts in them are untrusted."""
        about_rows = self.loras.notes() + manifest_notes(
            self.manifest,
            self.ids.duplicates(),
            self.ids.compared,
            self.n_rows,
            is_sample=self.spec.is_sample,
        )
        return (*about_rows, *self.prompt_notes.notes(), *self.model_notes)

    def document(self) -> dict[str, Any]:
        """The content of plan.json."""
        content = {
            "format_version": formats()[-1],
            "plan_hash": self.plan_hash,
            "identity": self.identity,
            "nsfw_threshold": self.spec.nsfw_threshold,
            "model": self.models[0].document,
            **self._models_and_axes(),
            "manifest": {
                "sources": [source.name for source in self.manifest.sources],
                "digest": self.digest,
                "own": list(self.manifest.own),
                "carried": self.manifest.carried.serialize().to_pybytes().hex(),
                "rows": self.n_rows,
                "rejected": self.rejects.count,
                "parts": [asdict(part) for part in self.snapshot.parts],
                "classes": [decode_class(self._class_fields, numbers) for numbers in self.grid.classes],
                "images": self.grid.images.tolist(),
            },
            "versions": {
                "python": platform.python_version(),
                **{name: version_of(name) for name in _VERSIONED},
                "code": own_code().digest,
            },
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        return {**content, "checksum": fingerprint(content)}

    @property
    def _class_fields(self) -> tuple[str, ...]:
        return class_fields(self.grid.axes, with_models=self.grid.with_models)

    def _models_and_axes(self) -> dict[str, Any]:
        """All models, and the axes as they were named, where rows or an axis name models."""
        if "models" not in self.identity:
            return {}
        return {
            "models": [model.document for model in self.models],
            "axes": [[axis.name, list(axis.values)] for axis in self.axes],
        }

    def plan(self) -> Plan:
        """The plan as its readers will know it. It is read from the spool, and no longer than that is there."""
        return Plan(self.document(), cast("Storage", _Spool(self.spec.out, self.digest, self.snapshot)))

    def summary(self) -> PlanSummary:
        """The plan in numbers; counts the tokens of the first 100,000 prompts."""
        identity = self.identity
        groups = tuple(map(describe_group, self.grid.groups))
        passes, waste = count_denoising(self.grid, identity["batch_size"])
        over, checked = self._count_long_prompts()
        own = set(self.manifest.own) - {axis.name for axis in self.grid.axes}
        return PlanSummary(
            plan_hash=self.plan_hash,
            out=display_url(self.spec.out),
            sources=tuple(source.name for source in self.manifest.sources),
            model=self.models[0].name,
            model_family=self.models[0].family,
            models=tuple(self._describe_models()),
            loras=dict(self.models[0].lora_scales),
            device=identity["device"],
            dtype=identity["dtype"],
            threads_per_actor=identity["threads_per_actor"],
            parameters=dict(identity["parameters"]),
            axes={axis.name: list(axis.values) for axis in self.axes},
            zips=tuple(tuple(axis.name for axis in group) for group in self.grid.dimensions if len(group) > 1),
            template=identity["template"],
            row_parameters=tuple(name for name in identity["parameters"] if name in own),
            rows=self.n_rows,
            rejected_rows=self.rejects.count,
            first_rejects=tuple(
                RejectNote(
                    source=source,
                    source_row=reject.line,
                    row_number=reject.row_number,
                    reason=reject.reason,
                    excerpt=reject.excerpt,
                )
                for source, reject in self.rejects.first
            ),
            samples=self.grid.n_samples,
            groups=groups,
            chunks=self.grid.n_chunks,
            chunk_size=self.spec.chunk_size,
            passes=passes,
            batch_size=identity["batch_size"],
            padding_waste=waste,
            prompt_syntax=identity["prompt_syntax"],
            long_prompts=identity["long_prompts"],
            token_limit=self.tokens.limit,
            tokens_over_limit=over,
            tokens_checked=checked,
            bytes_expected=expected_bytes(groups),
            safety=identity["safety"],
            on_flagged=identity["on_flagged"],
            watermark=identity["watermark"],
            watermark_policy=identity["watermark_policy"],
            carried_columns=tuple(self.manifest.carried.names),
            duplicate_ids=self.ids.duplicates(),
            ids_compared=self.ids.compared,
            notes=self.notes,
        )

    def _describe_models(self) -> Iterator[ModelNote]:
        """The models that an axis or rows name; none where the job names the only one."""
        for number, model in enumerate(self.models if "models" in self.identity else ()):
            samples = sum(group.n_samples for group in self.grid.groups if group.model == number)
            name = model.name if model.fault is None else model.source
            family = model.family if model.fault is None else "cannot be used"
            yield ModelNote(name=name, family=family, source=model.source, samples=samples)

    def _count_long_prompts(self) -> tuple[int, int]:
        """Rows whose prompt or negative prompt is too long, and rows checked."""
        if self.spec.long_prompts == "error":
            return self.tokens.refused, self.n_rows + self.tokens.refused
        over = checked = 0
        for batch in islice(self._prompts(), MAX_PROMPTS_TOKENIZED // _TOKENIZER_BATCH):
            over += sum(map(self.tokens.is_over, self.tokens.longest(batch)))
            checked += len(batch)
        return over, checked

    def _prompts(self) -> Iterator[pa.RecordBatch]:
        names = [name for name in ("prompt", "negative_prompt") if name in self.manifest.own]
        for part in range(len(self.snapshot.parts)):
            with pq.ParquetFile(self.snapshot.path(part)) as file:
                yield from file.iter_batches(_TOKENIZER_BATCH, columns=names)


@dataclass(frozen=True, slots=True)
class _Spool:
    """The parts of a snapshot, as a plan asks an output for them."""

    url: str
    digest: str
    snapshot: SnapshotWriter

    def read(self, path: str) -> bytes:
        parts = range(len(self.snapshot.parts))
        return self.snapshot.path({part_path(self.digest, part): part for part in parts}[path]).read_bytes()
