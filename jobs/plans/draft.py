"""From a job's spec to a draft of its plan: all is read and checked, and nothing is written in the output."""

from __future__ import annotations

import datetime
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import import_module, metadata
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.engine import SEED_LIMIT, WATERMARK_MIN_PIXELS, EngineError, ModelDescription, load_tokenizer
from latentmill.jobs.code import own_code
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.manifest import Manifest, open_manifest
from latentmill.jobs.manifests.tokens import TokenCounter
from latentmill.jobs.manifests.validate import Rules, check_job, snapshot_schema, validate
from latentmill.jobs.mark_bits import bits_needed
from latentmill.jobs.models.place import place_model
from latentmill.jobs.models.presets import ModelChoice, ModelDefaults, ResolvedModel, resolve_model
from latentmill.jobs.plans.columns import formats
from latentmill.jobs.plans.grid import Grid, class_fields, decode_class
from latentmill.jobs.plans.identity import default_parameters, plan_identity
from latentmill.jobs.plans.ids import MAX_IDS_COMPARED, IdCounter
from latentmill.jobs.plans.planned import fingerprint
from latentmill.jobs.plans.snapshot import RejectWriter, SnapshotWriter
from latentmill.jobs.plans.summary import (
    PlanSummary,
    RejectNote,
    describe_group,
    expected_bytes,
    manifest_notes,
    suspect_note,
)
from latentmill.jobs.scratch import PLAN_PREFIX, scratch_folder
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.urls import display_url
from latentmill.jobs.sweep import Axis, build_axes

MAX_PROMPTS_TOKENIZED = 100_000
_TOKENIZER_BATCH = 1_000
_VERSIONED = ("latentmill", "torch", "transformers", "pyarrow")


@dataclass(frozen=True)
class DraftPlan:
    """A plan that exists on this machine only: its snapshot lies in a temporary folder until the draft is closed."""

    spec: JobSpec
    model: ResolvedModel
    manifest: Manifest
    identity: Mapping[str, Any]
    snapshot: SnapshotWriter
    digest: str
    rejects: RejectWriter
    grid: Grid
    ids: IdCounter
    tokens: TokenCounter
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
        """What a user should know of the manifest, a line each; the texts in them are untrusted."""
        return manifest_notes(self.manifest, self.ids.duplicates(), self.ids.compared, self.n_rows)

    def document(self) -> dict[str, Any]:
        """The content of plan.json."""
        content = {
            "format_version": formats()[-1],
            "plan_hash": self.plan_hash,
            "identity": self.identity,
            "nsfw_threshold": self.spec.nsfw_threshold,
            "model": asdict(self.model),
            "manifest": {
                "sources": [source.name for source in self.manifest.sources],
                "digest": self.digest,
                "own": list(self.manifest.own),
                "carried": self.manifest.carried.serialize().to_pybytes().hex(),
                "rows": self.n_rows,
                "rejected": self.rejects.count,
                "parts": [asdict(part) for part in self.snapshot.parts],
                "classes": [decode_class(class_fields(self.grid.axes), numbers) for numbers in self.grid.classes],
                "images": self.grid.images.tolist(),
            },
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in _VERSIONED},
                "code": own_code().digest,
            },
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        return {**content, "checksum": fingerprint(content)}

    def summary(self) -> PlanSummary:
        """The plan in numbers; counts the tokens of the first 100,000 prompts."""
        identity = self.identity
        groups = tuple(
            describe_group(group, self.spec.chunk_size, identity["batch_size"]) for group in self.grid.groups
        )
        batches = sum(group.batches for group in groups)
        slots = batches * identity["batch_size"]
        over, checked = self._count_long_prompts()
        own = set(self.manifest.own) - {axis.name for axis in self.grid.axes}
        return PlanSummary(
            plan_hash=self.plan_hash,
            out=display_url(self.spec.out),
            sources=tuple(source.name for source in self.manifest.sources),
            model=self.model.name,
            model_family=self.model.family,
            device=identity["device"],
            dtype=identity["dtype"],
            threads_per_actor=identity["threads_per_actor"],
            parameters=dict(identity["parameters"]),
            axes={axis.name: list(axis.values) for axis in self.grid.axes},
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
            batches=batches,
            batch_size=identity["batch_size"],
            padded_slots=slots - self.grid.n_samples,
            padding_waste=1 - self.grid.n_samples / slots,
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

    def _count_long_prompts(self) -> tuple[int, int]:
        """Rows whose prompt or negative prompt is too long, and rows looked at."""
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


def draft_plan(spec: JobSpec, *, on_stage: Callable[[str], None] = lambda _: None) -> DraftPlan:
    """Check everything that can be checked before a model is loaded; writes nothing in the output.

    Raises UsageError for a job that cannot run. The caller closes the draft. `on_stage` hears what takes time now.
    """
    axes = build_axes(spec.sweep)
    _check_mark(spec)
    on_stage("finding and hashing the model")
    model, defaults, described = resolve_model(
        ModelChoice(
            source=spec.model,
            revision=spec.revision,
            tokenizer=spec.tokenizer,
            prediction_type=spec.prediction_type,
            timestep_spacing=spec.timestep_spacing,
        )
    )
    if spec.safety == "clip-concepts" and not described.has_safety_checker:
        raise UsageError(
            f"safety clip-concepts needs the folder safety_checker, which {model.name} lacks; use open-nsfw"
        )
    try:
        described.check_prompts(spec.prompt_syntax, spec.long_prompts)
    except EngineError as error:
        raise UsageError(str(error)) from None
    parameters = default_parameters(spec, defaults)
    on_stage("reading the manifest")
    manifest = open_manifest(spec.prompts, spec.manifest_format, accept_aliases=spec.accept_aliases)
    if spec.strict and manifest.suspects:
        raise UsageError(f"{suspect_note(manifest.suspects[0])} (strict refuses such columns)")
    axis_values = {axis.name: axis.values for axis in axes}
    tokens = TokenCounter(
        lambda: load_tokenizer(place_model(model)),
        syntax=spec.prompt_syntax,
        limit=None if model.max_tokens is None else model.max_tokens - 2,
        negatives=[str(text) for text in axis_values.get("negative_prompt", ())],
        default_negative=str(parameters["negative_prompt"]),
    )
    rules = Rules(
        factor=model.factor,
        min_pixels=0 if spec.watermark == "none" else WATERMARK_MIN_PIXELS,
        steps_fault=_steps_fault(described),
        defaults=parameters,
        axes=axis_values,
        tokens=tokens if spec.long_prompts == "error" else None,
    )
    check_job(rules, manifest.own)
    spool = ExitStack()
    folder = spool.enter_context(scratch_folder(Path(tempfile.gettempdir()), PLAN_PREFIX))
    try:
        return _draft(spec, model, defaults, manifest, rules, axes, tokens, folder, spool)
    except BaseException:
        spool.close()
        raise


def _draft(
    spec: JobSpec,
    model: ResolvedModel,
    defaults: ModelDefaults,
    manifest: Manifest,
    rules: Rules,
    axes: tuple[Axis, ...],
    tokens: TokenCounter,
    folder: Path,
    spool: ExitStack,
) -> DraftPlan:
    schema = snapshot_schema(manifest.own, manifest.carried)
    snapshot = SnapshotWriter(folder, schema, class_fields=class_fields(axes), defaults=rules.defaults)
    rejects = RejectWriter(folder / "rejected.parquet")
    ids = IdCounter(MAX_IDS_COMPARED if "id" in manifest.own else 0)
    digest = _spool(manifest, rules, schema, snapshot, rejects, ids, strict=spec.strict)
    grid = Grid(axes=axes, classes=tuple(snapshot.classes), images=snapshot.image_counts(), chunk_size=spec.chunk_size)
    grid.check_limits()
    _check_default_seeds(grid, snapshot, spec.seed)
    return DraftPlan(
        spec=spec,
        model=model,
        manifest=manifest,
        identity=plan_identity(spec, model, rules.defaults, axes, digest, spec.batch_size or defaults.batch_size),
        snapshot=snapshot,
        digest=digest,
        rejects=rejects,
        grid=grid,
        ids=ids,
        tokens=tokens,
        spool=spool,
    )


def _steps_fault(described: ModelDescription) -> Callable[[str, int], str | None]:
    """Why a sampler cannot take so many steps with this model, with the nearest number that it can; None if it can."""

    @cache
    def fault(sampler: str, steps: int) -> str | None:
        try:
            described.check_steps(sampler, steps)
        except EngineError as error:
            return f"sampler {sampler}: {error}"
        return None

    return fault


def _check_mark(spec: JobSpec) -> None:
    if spec.watermark == "none":
        return
    try:
        import_module("cv2")
    except ImportError as error:
        # OpenCV's usual build needs the system's libGL, and small containers have none.
        raise UsageError(
            f"the watermark needs OpenCV, which cannot be loaded here ({error}): install libgl1, or put "
            f"opencv-python-headless in its place, or use watermark none"
        ) from None
    n_bits = 8 * len(spec.watermark_text.encode())
    if spec.watermark_policy != "record" and bits_needed(n_bits) is None:
        raise UsageError(
            f"watermark_text {spec.watermark_text!r} has {n_bits} bits, too few to be told from chance; "
            f"watermark_policy {spec.watermark_policy} needs 3 bytes or more"
        )


def _spool(
    manifest: Manifest,
    rules: Rules,
    schema: pa.Schema,
    snapshot: SnapshotWriter,
    rejects: RejectWriter,
    ids: IdCounter,
    *,
    strict: bool,
) -> str:
    """Read, check and spool all rows; returns the digest of those that are kept."""
    offset = 0
    for source in manifest.sources:
        last = 0
        for batch in source.batches():
            if not len(batch):
                continue
            checked = validate(batch, offset, schema, rules)
            rejects.add(source.name, checked.rejects)
            if strict and checked.rejects:
                reject = checked.rejects[0]
                raise UsageError(
                    f"{source.name}, row {reject.line}: {reject.reason} (strict refuses a manifest with any bad row)"
                )
            snapshot.add(checked.kept)
            ids.add(checked.kept.column("row_id"))
            last = int(batch.lines[-1])
        offset += last
    digest = snapshot.close()
    rejects.close()
    names = ", ".join(source.name for source in manifest.sources[:3])
    if not snapshot.parts and not rejects.count:
        raise UsageError(f"manifest {names} holds no rows; put at least one prompt into it")
    if not snapshot.parts:
        source_name, reject = rejects.first[0]
        raise UsageError(
            f"none of the {rejects.count:,} rows is valid; the first, {source_name} row {reject.line}: {reject.reason}"
        )
    return digest


def _check_default_seeds(grid: Grid, snapshot: SnapshotWriter, seed: int) -> None:
    if any(axis.name == "seed" for axis in grid.axes) or not snapshot.rows_without_seed:
        return
    if seed + grid.n_samples > SEED_LIMIT:
        raise UsageError(
            f"seed {seed} plus {grid.n_samples:,} samples runs past {SEED_LIMIT - 1}, the last seed; "
            "use a lower seed, or give rows a seed of their own"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
