"""What a row says about shape and loop, as a few integers: its class, which plan.json stores in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from latentmill.engine import SAMPLER_CHOICES
from latentmill.jobs.errors import JobError
from latentmill.jobs.manifests.axes import Axis
from latentmill.jobs.manifests.fields import MODEL, Value
from latentmill.jobs.manifests.validate import VARIANTS

LOOP_FIELDS = ("width", "height", "num_inference_steps", "sampler", "guided")

RowClass = tuple[int, ...]
"""An integer per loop field that no axis gives: samplers by their index in SAMPLER_CHOICES, guided as 0 or 1."""


def class_fields(axes: Sequence[Axis], *, with_models: bool = False) -> tuple[str, ...]:
    """The loop fields that rows decide, because no axis gives them; also the models, where rows name them."""
    given = {"guided" if axis.name == "guidance_scale" else axis.name for axis in axes}
    return tuple(name for name in (*LOOP_FIELDS, *([MODEL] if with_models else [])) if name not in given)


def row_classes(table: pa.Table, fields: Sequence[str], defaults: Mapping[str, Value]) -> NDArray[np.int64]:
    """`(rows, len(fields))`: each row's class."""
    columns = [_class_column(table, name, defaults) for name in fields]
    return np.stack(columns, axis=1) if columns else np.zeros((len(table), 0), dtype=np.int64)


def _class_column(table: pa.Table, name: str, defaults: Mapping[str, Value]) -> NDArray[np.int64]:
    if name == MODEL:
        return np.asarray(table.column(MODEL).to_numpy(), dtype=np.int64)
    source = "guidance_scale" if name == "guided" else name
    default = defaults[source]
    if source not in table.column_names:
        return np.full(len(table), encode_value(name, default), dtype=np.int64)
    column = table.column(source).fill_null(default)
    if name == "sampler":
        encoded = column.combine_chunks().dictionary_encode()
        codes = np.array([SAMPLER_CHOICES.index(value) for value in encoded.dictionary.to_pylist()], dtype=np.int64)
        return codes[encoded.indices.to_numpy()] if len(table) else codes
    values = column.to_numpy()
    return np.asarray(values > 1.0 if name == "guided" else values, dtype=np.int64)


def encode_value(name: str, value: Value) -> int:
    """One value of a loop field as a class has it."""
    if name == "sampler":
        return SAMPLER_CHOICES.index(str(value))
    return int(float(value) > 1.0) if name == "guided" else int(value)


def decode_class(fields: Sequence[str], numbers: RowClass) -> list[Value]:
    """A class as it is stored: samplers by name, because their indices may change between versions."""
    return [
        SAMPLER_CHOICES[number] if name == "sampler" else number for name, number in zip(fields, numbers, strict=True)
    ]


def encode_class(fields: Sequence[str], values: Sequence[Value]) -> RowClass:
    """The reverse of `decode_class`. Raises JobError for a sampler that this version lacks."""
    for name, value in zip(fields, values, strict=True):
        if name == "sampler" and value not in SAMPLER_CHOICES:
            raise JobError(
                f"the plan has the sampler {value!r}, which this version lacks; use the version that made it"
            )
    return tuple(
        SAMPLER_CHOICES.index(str(value)) if name == "sampler" else int(value)
        for name, value in zip(fields, values, strict=True)
    )


def images_per_row(table: pa.Table, defaults: Mapping[str, Value]) -> NDArray[np.int64]:
    """How many images each row asks for, per combination of the axes: of each of its prompts, if it has several."""
    if "num_images" not in table.column_names:
        images = np.full(len(table), int(defaults["num_images"]), dtype=np.int64)
    else:
        images = np.asarray(table.column("num_images").fill_null(defaults["num_images"]).to_numpy(), dtype=np.int64)
    return images * table.column(VARIANTS).to_numpy() if VARIANTS in table.column_names else images
