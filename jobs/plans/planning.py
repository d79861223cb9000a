"""From a job's spec to a draft of its plan: everything is read and checked; nothing is written to the output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pyarrow as pa

from latentmill.engine import SEED_LIMIT, WATERMARK_MIN_PIXELS, EngineError, ModelDescription, load_tokenizer
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axes import Axis, build_axes
from latentmill.jobs.manifests.fields import DEFAULT_STRENGTH, FIELDS
from latentmill.jobs.manifests.image_rows import ImageRows
from latentmill.jobs.manifests.manifest import Manifest, open_manifest
from latentmill.jobs.manifests.rules import Rules
from latentmill.jobs.manifests.tokens import TokenCounter
from latentmill.jobs.manifests.validate import check_job, snapshot_schema, validate
from latentmill.jobs.models.choice import ModelChoice, ModelDefaults, resolve_model
from latentmill.jobs.models.place import place_model
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.draft import DraftPlan
from latentmill.jobs.plans.grid import Grid, class_fields
from latentmill.jobs.plans.identity import default_parameters, plan_identity
from latentmill.jobs.plans.ids import MAX_IDS_COMPARED, IdCounter
from latentmill.jobs.plans.snapshot import RejectWriter, SnapshotWriter
from latentmill.jobs.plans.summary import (
    suspect_note,
)
from latentmill.jobs.scratch import PLAN_PREFIX, scratch_folder
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.watermark_bits import bits_needed


def draft_plan(spec: JobSpec, *, on_stage: Callable[[str], None] = lambda _: None) -> DraftPlan:
    """Check everything that can be checked before a model is loaded; writes nothing in the output.

    Raises UsageError for a job that cannot run. The caller closes the draft. `on_stage` is told of slow stages.
    """
    axes = build_axes(spec.sweep)
    _check_watermark(spec)
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
    try:
        described.check_safety(spec.safety)
        described.check_prompts(spec.prompt_syntax, spec.long_prompts)
    except EngineError as error:
        raise UsageError(str(error)) from None
    parameters = default_parameters(spec, defaults)
    on_stage("reading the manifest")
    manifest = open_manifest(spec.prompts, spec.manifest_format, accept_aliases=spec.accept_aliases)
    if spec.strict and manifest.suspects:
        raise UsageError(f"{suspect_note(manifest.suspects[0])} (strict refuses such columns)")
    axis_values = {axis.name: axis.values for axis in axes}
    images = _image_rows(spec, manifest, described, axes, int(parameters["width"]) * int(parameters["height"]))
    if images is not None:
        parameters["strength"] = DEFAULT_STRENGTH if spec.strength is None else spec.strength
        sizes = {"width", "height"} if images.sized_by_image else set()
        manifest = replace(manifest, own=tuple(name for name in FIELDS if name in {*manifest.own, *sizes}))
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
        images=images,
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


def _image_rows(
    spec: JobSpec, manifest: Manifest, described: ModelDescription, axes: tuple[Axis, ...], most_pixels: int
) -> ImageRows | None:
    """How the rows' images are read, or None for a manifest without them. Raises UsageError for what needs them."""
    swept = {axis.name for axis in axes}
    if "image" in manifest.own:
        if described.pipeline is not None:
            raise UsageError(f"{spec.model} runs by the library diffusers, from prompts alone; drop the column image")
        given = spec.width is not None or spec.height is not None or swept & {"width", "height"}
        return ImageRows(factor=described.factor, most_pixels=most_pixels, sized_by_image=not given)
    lonely = [name for name in ("strength", "mask") if name in manifest.own]
    if lonely:
        raise UsageError(f"the manifest has a column {lonely[0]!r} but no column 'image'; add one, or rename it")
    if spec.strength is not None or "strength" in swept:
        raise UsageError("strength is given, but the manifest has no column 'image'; add one, or leave strength out")
    return None


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


def _check_watermark(spec: JobSpec) -> None:
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
            checked = validate(batch, offset, schema, rules, source.folder)
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
            "use a lower seed, or give each row a seed"
        )
