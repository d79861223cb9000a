"""From a job's spec to a draft of its plan: everything is read and checked; nothing is written to the output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pyarrow as pa

from latentmill.engine import SEED_LIMIT, WATERMARK_MIN_PIXELS, load_tokenizer
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axes import Axis, Dimension, build_axes, build_dimensions, models_of
from latentmill.jobs.manifests.fields import DEFAULT_STRENGTH, FIELDS, MODEL
from latentmill.jobs.manifests.image_rows import ImageRows
from latentmill.jobs.manifests.manifest import Manifest, open_manifest
from latentmill.jobs.manifests.prompt_texts import expand_axes, prompt_texts
from latentmill.jobs.manifests.row_loras import row_loras
from latentmill.jobs.manifests.rules import Rules
from latentmill.jobs.manifests.tokens import TokenCounter
from latentmill.jobs.manifests.validate import check_job, snapshot_schema, validate
from latentmill.jobs.manifests.wildcards import Templates, WildcardFolder, encode_wildcards, wildcards_digest
from latentmill.jobs.models.place import place_model
from latentmill.jobs.plans.draft import DraftPlan
from latentmill.jobs.plans.grid import Grid
from latentmill.jobs.plans.identity import default_parameters, plan_identity
from latentmill.jobs.plans.ids import MAX_IDS_COMPARED, IdCounter
from latentmill.jobs.plans.job_models import JobModels, find_models, models_of_rows, named_in_rows
from latentmill.jobs.plans.prompt_notes import PromptNotes, prompts_of_axis
from latentmill.jobs.plans.row_classes import class_fields
from latentmill.jobs.plans.snapshot import RejectWriter, SnapshotWriter
from latentmill.jobs.plans.summary import suspect_note
from latentmill.jobs.scratch import PLAN_PREFIX, scratch_folder
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.watermark_bits import bits_needed


def draft_plan(spec: JobSpec, *, on_stage: Callable[[str], None] = lambda _: None) -> DraftPlan:
    """Check everything that can be checked before a model is loaded; writes nothing in the output.

    Raises UsageError for a job that cannot run. The caller closes the draft. `on_stage` is told of slow stages.
    """
    wildcards = WildcardFolder(spec.wildcards)
    axes = expand_axes(spec.template, Templates(wildcards), build_axes(spec.sweep))
    dimensions = build_dimensions(axes, spec.zip)
    texts = prompt_texts(spec.template, wildcards, axes)
    _check_watermark(spec)
    on_stage("reading the manifest")
    manifest = open_manifest(spec.prompts, spec.manifest_format, accept_aliases=spec.accept_aliases)
    if spec.strict and manifest.suspects:
        raise UsageError(f"{suspect_note(manifest.suspects[0])} (strict refuses such columns)")
    on_stage("finding and hashing the model")
    if MODEL in manifest.own and not models_of(axes):
        models = models_of_rows(spec, named_in_rows(manifest, spec.model))
    else:
        models = find_models(spec, models_of(axes))
    parameters = default_parameters(spec, models.defaults)
    axis_values = {axis.name: axis.values for axis in axes}
    loras = row_loras(models.resolved[0].lora_scales, spec.prompt_syntax, tuple(axis_values))
    images = _image_rows(spec, manifest, models, axes, int(parameters["width"]) * int(parameters["height"]))
    if images is not None:
        parameters["strength"] = DEFAULT_STRENGTH if spec.strength is None else spec.strength
        sizes = {"width", "height"} if images.sized_by_image else set()
        manifest = replace(manifest, own=tuple(name for name in FIELDS if name in {*manifest.own, *sizes}))
    tokens = TokenCounter(
        lambda: load_tokenizer(place_model(models.first_usable)),
        syntax=spec.prompt_syntax,
        limit=models.token_limit,
        prompts=[str(text) for text in axis_values.get("prompt", ())],
        negatives=[str(text) for text in axis_values.get("negative_prompt", ())],
        default_negative=str(parameters["negative_prompt"]),
        longest_of=texts.longest,
        reads_tags=loras.reads_tags,
    )
    rules = Rules(
        factor=models.factor,
        max_side=models.max_side,
        min_pixels=0 if spec.watermark == "none" else WATERMARK_MIN_PIXELS,
        steps_fault=models.steps_fault,
        defaults=parameters,
        axes=axis_values,
        zips=[[axis.name for axis in dimension] for dimension in dimensions if len(dimension) > 1],
        models=models.numbers,
        unusable_models=models.unusable,
        default_model=spec.model,
        texts=texts,
        tokens=tokens if spec.long_prompts == "error" else None,
        loras=loras,
        images=images,
    )
    check_job(rules, manifest.own)
    spool = ExitStack()
    folder = spool.enter_context(scratch_folder(Path(tempfile.gettempdir()), PLAN_PREFIX))
    try:
        return _draft(spec, models, manifest, rules, axes, dimensions, tokens, wildcards, folder, spool)
    except BaseException:
        spool.close()
        raise


def _draft(
    spec: JobSpec,
    models: JobModels,
    manifest: Manifest,
    rules: Rules,
    axes: tuple[Axis, ...],
    dimensions: tuple[Dimension, ...],
    tokens: TokenCounter,
    wildcards: WildcardFolder,
    folder: Path,
    spool: ExitStack,
) -> DraftPlan:
    schema = snapshot_schema(manifest.own, manifest.carried, variants=rules.texts.counts_variants)
    with_models = MODEL in manifest.own
    fields = class_fields(axes, with_models=with_models)
    snapshot = SnapshotWriter(folder, schema, class_fields=fields, defaults=rules.defaults)
    rejects = RejectWriter(folder / "rejected.parquet")
    ids = IdCounter(MAX_IDS_COMPARED if "id" in manifest.own else 0)
    prompt_notes = PromptNotes(rules.texts)
    digest = _spool(manifest, rules, schema, snapshot, rejects, ids, prompt_notes, strict=spec.strict)
    grid = Grid(
        dimensions=dimensions,
        classes=tuple(snapshot.classes),
        images=snapshot.image_counts(),
        chunk_size=spec.chunk_size,
        models=models_of(axes),
        with_models=with_models,
    )
    grid.check_limits()
    _check_default_seeds(grid, snapshot, spec.seed)
    kept = encode_wildcards(wildcards.used) if wildcards.used else None
    return DraftPlan(
        spec=spec,
        models=models.resolved,
        manifest=manifest,
        identity=plan_identity(
            spec,
            models.resolved,
            rules.defaults,
            axes,
            digest,
            spec.batch_size or models.defaults.batch_size,
            several=with_models or bool(models_of(axes)),
            zips=[list(group) for group in rules.zips],
            wildcards=None if kept is None else wildcards_digest(kept),
        ),
        snapshot=snapshot,
        digest=digest,
        rejects=rejects,
        axes=axes,
        grid=grid,
        ids=ids,
        tokens=tokens,
        prompt_notes=prompt_notes,
        model_notes=models.notes,
        wildcards=kept,
        loras=rules.loras,
        spool=spool,
    )


def _image_rows(
    spec: JobSpec, manifest: Manifest, models: JobModels, axes: tuple[Axis, ...], most_pixels: int
) -> ImageRows | None:
    """How the rows' images are read, or None for a manifest without them. Raises UsageError for what needs them."""
    swept = {axis.name for axis in axes}
    if "image" in manifest.own:
        if models.images_fault is not None:
            raise UsageError(f"{models.images_fault}; drop the column image")
        given = spec.width is not None or spec.height is not None or swept & {"width", "height"}
        return ImageRows(factor=models.factor, most_pixels=most_pixels, sized_by_image=not given)
    lonely = [name for name in ("strength", "mask") if name in manifest.own]
    if lonely:
        raise UsageError(f"the manifest has a column {lonely[0]!r} but no column 'image'; add one, or rename it")
    if spec.strength is not None or "strength" in swept:
        raise UsageError("strength is given, but the manifest has no column 'image'; add one, or leave strength out")
    return None


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
    prompt_notes: PromptNotes,
    *,
    strict: bool,
) -> str:
    """Read, check and spool all rows; returns the digest of those that are kept."""
    if "prompt" in rules.axes:
        prompt_notes.add(prompts_of_axis(rules.axes["prompt"]))
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
            if "prompt" not in rules.axes:
                prompt_notes.add(checked.kept.column("prompt"))
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
