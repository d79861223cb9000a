"""The plan as its readers know it: small, immutable, and able to say what any chunk is made of."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from latentmill.engine import GenerationRequest
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.axes import Axis, Dimension, build_dimensions, models_of
from latentmill.jobs.manifests.fields import MODEL, Value, shorten
from latentmill.jobs.manifests.loras import COLUMN, format_scale, lora_of_axis
from latentmill.jobs.manifests.prompt_texts import TEMPLATE_COLUMN, added_columns, prompt_texts
from latentmill.jobs.manifests.row_loras import RowLoras
from latentmill.jobs.manifests.validate import VARIANTS, snapshot_schema
from latentmill.jobs.manifests.wildcards import PlannedWildcards
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.columns import MIXED_CHUNKS_SINCE, columns_of, formats, values
from latentmill.jobs.plans.grid import MAX_SAMPLES, Grid, Group, Piece, Place
from latentmill.jobs.plans.option_columns import option_fields, option_values
from latentmill.jobs.plans.row_classes import class_fields, encode_class
from latentmill.jobs.plans.sample import PlannedSample
from latentmill.jobs.plans.snapshot import PartInfo, SnapshotReader
from latentmill.jobs.plans.snapshot_rows import SnapshotRows
from latentmill.jobs.settings import settings_of
from latentmill.jobs.spec import MAX_CHUNK, JobSpec

if TYPE_CHECKING:
    from latentmill.jobs.store.storage import Storage

PLAN_PATH = "_job/plan.json"
REJECTED_PATH = "_job/rejected.parquet"
MAX_PLAN_BYTES = 64 << 20

_MIN_ID_DIGITS = 8
_FAULTS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading a damaged document may raise, besides the project's own errors."""


def canonical(value: Any) -> str:
    """JSON with one spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def part_path(digest: str, part: int) -> str:
    """Where a part of the manifest snapshot lies in the output."""
    return f"_job/manifest-{digest[:16]}-{part:05d}.parquet"


def wildcards_path(digest: str) -> str:
    """Where the wildcards of a plan's templates lie in the output."""
    return f"_job/wildcards-{digest[:16]}.json"


def record_names(carried: Sequence[str], own: Collection[str]) -> list[str]:
    """The carried columns' names in the commit record: a name that is among our `own` gets the prefix `manifest_`."""
    taken = {*own, *carried}
    names: list[str] = []
    for name in carried:
        if name in own:
            while name in taken:
                name = f"manifest_{name}"  # noqa: PLW2901 - as the dataset has it
            taken.add(name)
        names.append(name)
    return names


def _settings(document: Mapping[str, Any], out: str) -> JobSpec:
    identity, model = document["identity"], document["model"]
    names = [name for name, setting in settings_of(JobSpec).items() if setting.planned and name in identity]
    chosen = ("revision", "tokenizer", "prediction_type", "timestep_spacing")
    return JobSpec(
        prompts=tuple(document["manifest"]["sources"]),
        out=out,
        model=model["source"],
        sweep=dict(document.get("axes", identity["axes"])),
        zip=tuple(map(tuple, identity.get("zip", ()))),
        vae=model.get("vae"),
        preview_decoder=model.get("preview_decoder"),
        lora={
            name: f"{place}:{format_scale(identity['loras'][name])}" for name, place in model.get("loras", {}).items()
        },
        **{name: model[name] for name in chosen},
        **identity["parameters"],
        **({name: identity[name] for name in names} | {"nsfw_threshold": document["nsfw_threshold"]}),
    )


class Plan:
    """What the output's plan.json says. Two plans with one `plan_hash` make the same rows and pixels.

    `settings` is the job as it was planned: with what was computed filled in, and with defaults for what changes no
    row. `batch_size` is the one in it, which is never None here.
    """

    def __init__(self, document: Mapping[str, Any], storage: Storage) -> None:
        self._document = document
        self._storage = storage
        identity, manifest = document["identity"], document["manifest"]
        self.format_version: int = document["format_version"]
        self.plan_hash: str = document["plan_hash"]
        self.identity: Mapping[str, Any] = identity
        self.versions: Mapping[str, str] = document["versions"]
        self.models = tuple(ResolvedModel(**model) for model in document.get("models", [document["model"]]))
        self.model = self.models[0]
        self.parameters: Mapping[str, Value] = identity["parameters"]
        self.axes = tuple(
            Axis(name=name, values=tuple(values)) for name, values in document.get("axes", identity["axes"])
        )
        self.settings: JobSpec = _settings(document, storage.url)
        self.batch_size: int = identity["batch_size"]
        self.sources: tuple[str, ...] = tuple(manifest["sources"])
        self.n_rows: int = manifest["rows"]
        self.n_rejected: int = manifest["rejected"]
        with_models = MODEL in manifest["own"]
        fields = class_fields(self.axes, with_models=with_models)
        self.grid = Grid(
            dimensions=build_dimensions(self.axes, self.settings.zip),
            classes=tuple(encode_class(fields, values) for values in manifest["classes"]),
            images=np.array(manifest["images"], dtype=np.int64).reshape(len(manifest["parts"]), -1),
            chunk_size=self.settings.chunk_size,
            mixed=self.format_version >= MIXED_CHUNKS_SINCE,
            models=models_of(self.axes),
            with_models=with_models,
        )
        wildcards: str | None = identity.get("wildcards")
        self._texts = prompt_texts(
            self.settings.template,
            PlannedWildcards(lambda: storage.read(wildcards_path(str(wildcards))), wildcards),
            self.axes,
        )
        self._added = added_columns(self.settings.template, self.axes)
        self._loras = RowLoras(self.model.lora_scales, self.settings.prompt_syntax)
        self.columns = columns_of(self.format_version, manifest["own"])
        fixed = [pa.field(column.name, column.type) for column in self.columns]
        added = [pa.field(name, pa.string()) for name in self._added]
        own = [*fixed, *added, *option_fields(self.model)]
        carried = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(manifest["carried"])))
        self._names = record_names(carried.names, [field.name for field in own])
        self.record_schema = pa.schema(
            [*own, *(pa.field(name, entry.type) for name, entry in zip(self._names, carried, strict=True))]
        )
        self._snapshot = SnapshotReader(
            lambda part: storage.read(part_path(manifest["digest"], part)),
            [PartInfo(**part) for part in manifest["parts"]],
            snapshot_schema(tuple(manifest["own"]), carried, variants=self._texts.counts_variants),
            class_fields=fields,
            defaults=self.parameters,
        )

    def of_model(self, number: int) -> Plan:
        """The same plan, for one of its models: `model` is that one."""
        view = copy.copy(self)
        view.model = self.models[number]
        return view

    def model_of(self, chunk: int) -> int:
        """The number of the model that draws the chunk."""
        return self.grid.model_of(chunk) if len(self.models) > 1 else 0

    def constants_of(self, model: int) -> dict[str, Any]:
        """What is the same in all rows of a model: what, beside its own columns, a row's picture was made with."""
        return self._constants[model]

    @cached_property
    def _constants(self) -> list[dict[str, Any]]:
        return [values(self.columns, "job", self.of_model(number)) for number in range(len(self.models))]

    @property
    def shown_dimensions(self) -> tuple[Dimension, ...]:
        """The axes to be shown: models by their names, as far as these are not the same."""
        sources, names = models_of(self.axes), [model.name for model in self.models]
        if len(set(names)) < len(names):
            return self.grid.dimensions

        def shown(axis: Axis) -> Axis:
            return Axis(name=axis.name, values=tuple(names[sources.index(str(value))] for value in axis.values))

        return tuple(
            tuple(shown(axis) if axis.name == MODEL else axis for axis in dimension)
            for dimension in self.grid.dimensions
        )

    @property
    def license(self) -> str | None:
        """That of the models' weights, if it is known and one for all."""
        licenses = {model.license for model in self.models}
        return licenses.pop() if len(licenses) == 1 else None

    @property
    def file_metadata(self) -> dict[str, str]:
        """What is the same in all rows, for the metadata of Parquet files, with the plan's hash and the license."""
        first, *others = self._constants
        if not first:
            return {}
        shared = {name: value for name, value in first.items() if all(other[name] == value for other in others)}
        known = {**shared, "plan_hash": self.plan_hash, "model_license": self.license}
        return {f"latentmill.{name}": str(value) for name, value in sorted(known.items()) if value is not None}

    @property
    def merged_loras(self) -> dict[str, float]:
        """LoRAs whose scale is the same in all samples: they can be part of the weights, which is faster."""
        if self._loras.reads_tags or COLUMN in self._document["manifest"]["own"]:
            return {}
        swept = {lora_of_axis(axis.name) for axis in self.axes}
        return {name: scale for name, scale in self.model.lora_scales.items() if name not in swept}

    @property
    def seeds_follow_places(self) -> bool:
        """Whether neither an axis nor a column of the rows names seeds, so that they follow from samples' places."""
        return "seed" not in {*(axis.name for axis in self.axes), *self._document["manifest"]["own"]}

    @property
    def n_samples(self) -> int:
        """All samples of the job."""
        return self.grid.n_samples

    @property
    def n_chunks(self) -> int:
        """All chunks of the job; they are numbered 0..n_chunks-1."""
        return self.grid.n_chunks

    def pieces_of_groups(self) -> list[Iterator[Piece]]:
        """For each group what chunks have of it, in order; so read, its samples ascend by ordinal."""
        return [self.grid.pieces_of(section, group) for section in self.grid.sections for group in section.groups]

    def groups_in(self, chunk: int) -> int:
        """How many groups have samples in the chunk."""
        section, start, stop = self.grid.section_of(chunk)
        return sum(1 for _ in section.cut(start, stop))

    def samples_in_chunks(self, chosen: NDArray[np.bool_]) -> int:
        """How many samples the chosen chunks hold; `chosen` has one entry per chunk."""
        total = int(np.count_nonzero(chosen)) * self.settings.chunk_size
        for section in self.grid.sections:
            if chosen[section.first_chunk + section.n_chunks - 1]:
                total -= section.n_chunks * self.settings.chunk_size - section.n_samples
        return total

    def images_per_row(self) -> Iterator[int]:
        """For each valid row, in order, how many images it asks for with every combination of the axes."""
        for part in range(len(self.grid.images)):
            _, rows = self._snapshot.part(part)
            yield from rows.images.tolist()

    def samples_of_chunk(self, chunk: int) -> list[PlannedSample]:
        """The chunk's samples in order of execution, all of one shape. Reads only the parts that they come from."""
        section, start, stop = self.grid.section_of(chunk)
        samples: list[PlannedSample] = []
        for group, first, last in section.cut(start, stop):
            samples += self._samples_of_group(group, first, last)
        return samples

    def _samples_of_group(self, group: Group, start: int, stop: int) -> Iterator[PlannedSample]:
        for part, first, last in self.grid.pieces(group, start, stop):
            table, rows = self._snapshot.part(part)
            places = list(rows.places(self.grid, group, part, first, last))
            low, high = places[0].row, places[-1].row
            values = SnapshotRows(table.slice(low, high - low + 1))
            yield from (self._sample(values, place, place.row - low, group.model) for place in places)

    @cached_property
    def _id_digits(self) -> int:
        return max(_MIN_ID_DIGITS, len(str(self.n_samples - 1)))

    def _sample(self, rows: SnapshotRows, place: Place, row: int, model: int) -> PlannedSample:
        dimensions = zip(self.grid.dimensions, place.digits, strict=True)
        swept = {axis.name: axis.values[digit] for dimension, digit in dimensions for axis in dimension}

        def value(name: str) -> Any:
            if name in swept:
                return swept[name]
            own = rows.get(name, row)
            return self.parameters[name] if own is None else own

        given, image = swept.get("seed", rows.get("seed", row)), rows.image(row)
        variant, number = (
            divmod(place.image, rows.images(row, self.parameters)) if VARIANTS in rows else (0, place.image)
        )
        seed = int(self.parameters["seed"]) + place.ordinal if given is None else int(given) + number
        prompt = swept.get("prompt", rows.get("prompt", row))
        request = GenerationRequest(
            prompt=self._texts.prompt(prompt, seed, variant, swept),
            negative_prompt=self._texts.negative(value("negative_prompt"), swept),
            seed=seed,
            width=value("width"),
            height=value("height"),
            num_inference_steps=value("num_inference_steps"),
            guidance_scale=value("guidance_scale"),
            sampler=value("sampler"),
            eta=value("eta"),
            loras=tuple(self._loras.of(rows.get("loras", row), rows.get("prompt", row), swept).items()),
            image=image,
            strength=None if image is None else value("strength"),
        )
        return PlannedSample(
            ordinal=place.ordinal,
            sample_id=f"{place.ordinal:0{self._id_digits}d}",
            row_number=rows.get("row_number", row),
            row_id=rows.get("row_id", row),
            request=request,
            extra={name: prompt if name == TEMPLATE_COLUMN else swept[name] for name in self._added}
            | option_values(self.models[model], request)
            | dict(zip(self._names, rows.carried(row), strict=True)),
            model=model,
        )


def parse_plan(data: bytes, storage: Storage) -> Plan:
    """The plan in a plan.json. Raises JobError if the file is not exactly as it was written."""
    try:
        document = json.loads(data)
        checksum = document.pop("checksum")
        version = document["format_version"]
    except _FAULTS as error:
        raise JobError(
            f"{PLAN_PATH} cannot be read: {shorten(error)}; restore it from a copy, or use another output"
        ) from error
    if version not in formats():
        raise JobError(
            f"{PLAN_PATH} has format {version}, this version reads {', '.join(map(str, formats()))}; "
            f"use the version that made it"
        )
    try:
        if checksum != fingerprint(document) or document["plan_hash"] != fingerprint(document["identity"]):
            raise ValueError("its checksum is not that of what it says")
        plan = Plan(document, storage)
        if ((plan.grid.images < 0) | (plan.grid.images > MAX_SAMPLES)).any():
            raise ValueError("its counts of images are impossible")
        plan.grid.check_limits()
        if not 1 <= plan.settings.chunk_size <= MAX_CHUNK or not plan.n_samples:
            raise ValueError(f"its chunks have {plan.settings.chunk_size} samples")
        if not all(0 <= group.model < len(plan.models) for group in plan.grid.groups):
            raise ValueError("its models are not those that its samples need")
    except (*_FAULTS, pa.ArrowException, UsageError) as error:
        raise JobError(
            f"{PLAN_PATH} was changed after it was written ({shorten(error)}); restore it from a copy, or use another "
            f"output"
        ) from error
    return plan
