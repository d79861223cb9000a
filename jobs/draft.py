"""From a job's spec to a draft of its plan: all is read and checked, and nothing is written in the output."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from engine import SEED_LIMIT, WATERMARK_MIN_PIXELS, load_tokenizer
from jobs.errors import UsageError
from jobs.fields import Value
from jobs.grid import Grid, class_fields, decode_class
from jobs.manifest import Manifest, open_manifest
from jobs.planned import FORMAT_VERSION, fingerprint
from jobs.presets import ModelDefaults, ResolvedModel, resolve_model
from jobs.snapshot import RejectWriter, SnapshotWriter
from jobs.spec import JobSpec
from jobs.summary import PlanSummary, RejectNote, describe_group, expected_bytes
from jobs.sweep import Axis, build_axes
from jobs.urls import display_url
from jobs.validate import Rules, check_job, snapshot_schema, validate

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
    folder: Path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the spool."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def n_rows(self) -> int:
        """Valid rows."""
        return sum(part.rows for part in self.snapshot.parts)

    @cached_property
    def plan_hash(self) -> str:
        """The fingerprint of all that can change a pixel or a row."""
        return fingerprint(self.identity)

    def document(self) -> dict[str, Any]:
        """The content of plan.json."""
        content = {
            "format_version": FORMAT_VERSION,
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
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
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
            token_limit=self.model.max_tokens - 2,
            tokens_over_limit=over,
            tokens_checked=checked,
            bytes_expected=expected_bytes(groups),
            safety=identity["safety"],
            on_flagged=identity["on_flagged"],
            watermark=identity["watermark"],
            carried_columns=tuple(self.manifest.carried.names),
        )

    def _count_long_prompts(self) -> tuple[int, int]:
        tokenizer = load_tokenizer(self.model.folder)
        over = checked = 0
        for prompts in islice(self._prompts(), MAX_PROMPTS_TOKENIZED // _TOKENIZER_BATCH):
            over += sum(count > self.model.max_tokens - 2 for count in tokenizer.count(prompts))
            checked += len(prompts)
        return over, checked

    def _prompts(self) -> Iterator[list[str]]:
        for part in range(len(self.snapshot.parts)):
            with pq.ParquetFile(self.snapshot.path(part)) as file:
                for batch in file.iter_batches(_TOKENIZER_BATCH, columns=["prompt"]):
                    yield batch.column("prompt").to_pylist()


def draft_plan(spec: JobSpec) -> DraftPlan:
    """Check everything that can be checked before a model is loaded; writes nothing in the output.

    Raises UsageError for a job that cannot run. The caller closes the draft.
    """
    axes = build_axes(spec.sweep)
    model, defaults, described = resolve_model(spec.model, spec.revision)
    parameters = _parameters(spec, defaults)
    manifest = open_manifest(spec.prompts)
    rules = Rules(
        factor=model.factor,
        min_pixels=0 if spec.watermark == "none" else WATERMARK_MIN_PIXELS,
        max_steps=described.num_train_timesteps,
        defaults=parameters,
        axes={axis.name: axis.values for axis in axes},
    )
    check_job(rules, manifest.own)
    folder = Path(tempfile.mkdtemp(prefix="latentmill-plan-"))
    try:
        return _draft(spec, model, defaults, manifest, rules, axes, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _draft(
    spec: JobSpec,
    model: ResolvedModel,
    defaults: ModelDefaults,
    manifest: Manifest,
    rules: Rules,
    axes: tuple[Axis, ...],
    folder: Path,
) -> DraftPlan:
    schema = snapshot_schema(manifest.own, manifest.carried)
    snapshot = SnapshotWriter(folder, schema, class_fields=class_fields(axes), defaults=rules.defaults)
    rejects = RejectWriter(folder / "rejected.parquet")
    digest = _spool(manifest, rules, schema, snapshot, rejects, strict=spec.strict)
    grid = Grid(axes=axes, classes=tuple(snapshot.classes), images=snapshot.image_counts(), chunk_size=spec.chunk_size)
    grid.check_limits()
    _check_default_seeds(grid, snapshot, spec.seed)
    return DraftPlan(
        spec=spec,
        model=model,
        manifest=manifest,
        identity=_identity(spec, model, rules.defaults, axes, digest, spec.batch_size or defaults.batch_size),
        snapshot=snapshot,
        digest=digest,
        rejects=rejects,
        grid=grid,
        folder=folder,
    )


def _spool(
    manifest: Manifest,
    rules: Rules,
    schema: pa.Schema,
    snapshot: SnapshotWriter,
    rejects: RejectWriter,
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


def _parameters(spec: JobSpec, defaults: ModelDefaults) -> dict[str, Value]:
    """Each parameter's value for rows and axes that do not give it: flag or job file over preset."""

    def first(given: Value | None, default: Value) -> Value:
        return default if given is None else given

    return {
        "negative_prompt": first(spec.negative_prompt, ""),
        "seed": spec.seed,
        "width": first(spec.width, defaults.width),
        "height": first(spec.height, defaults.height),
        "num_inference_steps": first(spec.num_inference_steps, defaults.num_inference_steps),
        "guidance_scale": first(spec.guidance_scale, defaults.guidance_scale),
        "sampler": first(spec.sampler, defaults.sampler),
        "eta": first(spec.eta, 0.0),
        "num_images": spec.num_images,
    }


def _identity(
    spec: JobSpec,
    model: ResolvedModel,
    parameters: Mapping[str, Value],
    axes: tuple[Axis, ...],
    digest: str,
    batch_size: int,
) -> dict[str, Any]:
    """All that can change a pixel or a row, and nothing else."""
    device = _resolve_device(spec)
    if spec.dtype == "float16" and device == "cpu":
        raise UsageError("dtype float16 does not run on cpu; use float32, or device cuda")
    return {
        "model_files": dict(sorted(model.files.items())),
        "parameters": dict(parameters),
        "axes": [[axis.name, list(axis.values)] for axis in axes],
        "manifest": digest,
        "chunk_size": spec.chunk_size,
        "batch_size": batch_size,
        "device": device,
        "dtype": spec.dtype if spec.dtype != "auto" else "float16" if device == "cuda" else "float32",
        "threads_per_actor": _resolve_threads(spec),
        "safety": spec.safety,
        "nsfw_threshold": None if spec.safety == "none" else spec.nsfw_threshold,
        "on_flagged": spec.on_flagged,
        "watermark": spec.watermark,
        "watermark_text": "" if spec.watermark == "none" else spec.watermark_text,
        "format": spec.format,
    }


def _resolve_device(spec: JobSpec) -> str:
    """`auto` is cuda where actors are given GPUs or this machine has one. Torch is asked only if a driver is there."""
    if spec.device != "auto":
        return spec.device
    if spec.runtime.gpus_per_actor is not None:
        return "cuda" if spec.runtime.gpus_per_actor > 0 else "cpu"
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve_threads(spec: JobSpec) -> int:
    """Threads change bits, so they are planned: one, for one actor per core, unless the number of actors is given.

    One thread by default, whatever the machine and the executor, makes the same job the same plan everywhere.
    """
    if spec.threads_per_actor is not None:
        return spec.threads_per_actor
    if spec.runtime.num_actors is None:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // spec.runtime.num_actors)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
