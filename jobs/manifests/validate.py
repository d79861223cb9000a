"""Every row checked against the limits of fields, model and job: vectorised, with a reason for each reject."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.engine import SAMPLER_CHOICES, SAMPLERS_WITH_ETA, SEED_LIMIT
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.columns import to_plain
from latentmill.jobs.manifests.fields import FIELDS, MAX_TEXT_BYTES, Field, FieldError, Value, shorten
from latentmill.jobs.manifests.readers import RowBatch
from latentmill.jobs.manifests.tokens import TokenCounter

EXCERPT_CHARACTERS = 200
CARRIED_PREFIX = "carried."
"""Carried columns have this prefix in the snapshot, so that no name of the user's meets one of ours there."""

_ID_LIMIT = 10**60

_ARROW_TYPES = {"text": pa.string(), "sampler": pa.string(), "int": pa.int64(), "float": pa.float64()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What rows are checked against. Where an axis gives a parameter, the row's value and the default do not count.

    `steps_fault` says why a sampler cannot take so many steps, or None. `tokens` is there if long prompts are faults.
    """

    factor: int
    min_pixels: int
    steps_fault: Callable[[str, int], str | None]
    defaults: Mapping[str, Value]
    axes: Mapping[str, tuple[Value, ...]]
    tokens: TokenCounter | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A row that is left out, and why."""

    line: int
    row_number: int
    row_id: str
    reason: str
    excerpt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A batch after validation: the rows that are kept, in the snapshot's columns, and those that are not."""

    kept: pa.RecordBatch
    rejects: list[Reject]


def snapshot_schema(own: tuple[str, ...], carried: pa.Schema) -> pa.Schema:
    """Columns of the snapshot: the row's number and id, the manifest's columns that are ours, the carried ones."""
    ours = [pa.field(name, _ARROW_TYPES[FIELDS[name].kind]) for name in own if name != "id"]
    theirs = [pa.field(CARRIED_PREFIX + entry.name, entry.type) for entry in carried]
    return pa.schema([pa.field("row_number", pa.int64()), pa.field("row_id", pa.string()), *ours, *theirs])


def check_job(rules: Rules, own: tuple[str, ...]) -> None:
    """Refuse what no row can mend: axis values, and defaults that no column overrides."""
    for name, values in rules.axes.items():
        for value in values:
            fault = _value_fault(name, value, rules) or _length_fault(name, value, rules)
            if fault:
                raise UsageError(f"sweep axis {name}: {fault}")
    if "negative_prompt" not in own and "negative_prompt" not in rules.axes:
        fault = _length_fault("negative_prompt", rules.defaults["negative_prompt"], rules)
        if fault:
            raise UsageError(fault)
    for fields, bad, reason in _pair_rules({}, 1, rules):
        if bad.any() and not (fields - rules.axes.keys()) & set(own):
            raise UsageError(reason(0))


def validate(batch: RowBatch, offset: int, schema: pa.Schema, rules: Rules) -> Checked:
    """Check one batch; a row's number is `offset` plus its number in its file. No row is both kept and rejected."""
    faults: dict[int, list[str]] = {index: [reason] for index, reason in batch.faults.items()}
    columns: dict[str, pa.Array] = {}
    count = len(batch)
    for name in FIELDS:
        if name in batch.columns:
            columns[name] = _coerce(FIELDS[name], batch.columns[name], faults)
        elif name in schema.names:
            columns[name] = pa.nulls(count, schema.field(name).type)
    for index in np.flatnonzero(columns["prompt"].is_null().to_numpy(zero_copy_only=False)):
        faults.setdefault(int(index), ["prompt is missing; write one ('' is a blank prompt), or leave the row out"])
    for entry in schema:
        if entry.name.startswith(CARRIED_PREFIX):
            values = batch.columns.get(entry.name.removeprefix(CARRIED_PREFIX))
            columns[entry.name] = _carry(entry, values, count, faults)
    for _, bad, reason in _pair_rules(columns, count, rules):
        for index in np.flatnonzero(bad):
            faults.setdefault(int(index), [reason(int(index))])
    if rules.tokens is not None:
        _check_lengths(columns, rules, rules.tokens, faults)
    numbers = batch.lines + offset
    columns["row_number"] = pa.array(numbers)
    text_numbers = columns["row_number"].cast(pa.string())
    columns["row_id"] = pc.coalesce(columns["id"], text_numbers) if "id" in columns else text_numbers
    kept = pa.RecordBatch.from_arrays([columns[entry.name] for entry in schema], schema=schema)
    if not faults:
        return Checked(kept=kept, rejects=[])
    rejects = [
        Reject(
            line=int(batch.lines[index]),
            row_number=int(numbers[index]),
            row_id=columns["row_id"][index].as_py() or "",
            reason="; ".join(reasons),
            excerpt=_excerpt(batch.columns.get("prompt"), index),
        )
        for index, reasons in sorted(faults.items())
    ]
    mask = np.ones(count, dtype=bool)
    mask[list(faults)] = False
    return Checked(kept=kept.filter(pa.array(mask)), rejects=rejects)


def _coerce(field: Field, values: Any, faults: dict[int, list[str]]) -> pa.Array:
    """The column with its field's type; values that the field refuses become null and a fault."""
    array = _fast_array(field, values)
    if array is None:
        return _slow_array(field, values if isinstance(values, list) else _without_nan(_to_pylist(values)), faults)
    suspects = np.flatnonzero(_suspects(field, array))
    if not len(suspects):
        return array
    mask = np.zeros(len(array), dtype=bool)
    for index in suspects:
        try:
            field.parse(array[int(index)].as_py())
        except FieldError as error:
            faults.setdefault(int(index), []).append(str(error))
            mask[index] = True
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def _fast_array(field: Field, values: Any) -> pa.Array | None:
    """The column cast in one step, or None if some value stands in the way."""
    type_ = _ARROW_TYPES[field.kind]
    try:
        if not isinstance(values, list):
            array = to_plain(values)
            if pa.types.is_floating(array.type) and field.kind in {"int", "float"}:
                # pandas writes missing numbers as NaN
                array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
            array.validate(full=True)
            return array.cast(type_)
        kinds = set(map(type, values)) - {type(None)}
        if field.kind in {"int", "float"} and kinds == {str}:
            return pc.utf8_trim_whitespace(pa.array(values, pa.string())).cast(type_)
        if not kinds <= ({str} if type_ == pa.string() else {int} if field.kind == "int" else {int, float}):
            return None
        return pa.array(values, type_)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _slow_array(field: Field, values: list[Any], faults: dict[int, list[str]]) -> pa.Array:
    parsed: list[Any] = [None] * len(values)
    for index, value in enumerate(values):
        if value is None:
            continue
        if field.name == "id" and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) >= _ID_LIMIT:
                faults.setdefault(index, []).append(f"id {shorten(value)} is too long for a number; write it in quotes")
                continue
            value = str(value)  # noqa: PLW2901
        if field.kind in {"int", "float"} and isinstance(value, str):
            value = value.strip()  # noqa: PLW2901
        try:
            parsed[index] = field.parse(value)
        except FieldError as error:
            faults.setdefault(index, []).append(str(error))
    return pa.array(parsed, _ARROW_TYPES[field.kind])


def _without_nan(values: list[Any]) -> list[Any]:
    """What pandas writes for a missing number; in JSON, where it writes null, NaN is a value like any other."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]


def _to_pylist(array: pa.Array) -> list[Any]:
    """The values as Python objects; text that is not UTF-8 gets lone surrogates instead of an exception."""
    plain = to_plain(array)
    if pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type):
        binary = plain.view(pa.binary() if pa.types.is_string(plain.type) else pa.large_binary())
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in binary.to_pylist()]
    return list(plain.to_pylist())


def _suspects(field: Field, array: pa.Array) -> NDArray[np.bool_]:
    """Rows whose value needs a closer look; every refused value is among them."""
    if field.kind == "text":
        found = pc.or_(pc.greater(pc.binary_length(array), MAX_TEXT_BYTES), pc.match_substring(array, "\0"))
    elif field.kind == "sampler":
        found = pc.invert(pc.is_in(array, value_set=pa.array([*SAMPLER_CHOICES, None], pa.string())))
    else:
        inside = pc.and_(pc.greater_equal(array, field.low), pc.less_equal(array, field.high))
        found = pc.invert(inside)
    return np.asarray(found.fill_null(fill_value=False).to_numpy(zero_copy_only=False), dtype=bool)


def _carry(entry: pa.Field, values: Any, count: int, faults: dict[int, list[str]]) -> pa.Array:
    """A carried column unchanged; only text that is no text at all is a fault."""
    if values is None:
        return pa.nulls(count, entry.type)
    try:
        array = pa.array(values, entry.type) if isinstance(values, list) else to_plain(values).cast(entry.type)
        array.validate(full=True)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return _carry_one_by_one(entry, values, faults)
    return array


def _carry_one_by_one(entry: pa.Field, values: Any, faults: dict[int, list[str]]) -> pa.Array:
    pieces = []
    for index in range(len(values)):
        piece = values[index : index + 1]
        try:
            array = pa.array(piece, entry.type) if isinstance(piece, list) else to_plain(piece).cast(entry.type)
            array.validate(full=True)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            name = shorten(entry.name.removeprefix(CARRIED_PREFIX))
            faults.setdefault(index, []).append(f"column {name} holds a value that is not {entry.type}; correct it")
            array = pa.nulls(1, entry.type)
        pieces.append(array)
    return pa.concat_arrays(pieces)


Rule = tuple[frozenset[str], NDArray[np.bool_], Any]


def _pair_rules(columns: Mapping[str, pa.Array], count: int, rules: Rules) -> Iterator[Rule]:
    """What single fields cannot tell: each rule's parameters, the rows that break it, and the reason for one row."""

    def bounds(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        if name in rules.axes:
            numbers = [value for value in rules.axes[name] if not isinstance(value, str)]
            return np.full(count, min(numbers)), np.full(count, max(numbers))
        default = rules.defaults[name]
        if name not in columns:
            return np.full(count, default), np.full(count, default)
        values = columns[name].fill_null(default).to_numpy(zero_copy_only=False)
        return values, values

    for name in ("width", "height"):
        if name not in rules.axes:
            values = bounds(name)[0]
            bad = values % rules.factor != 0
            yield frozenset({name}), bad, lambda i, n=name, v=values: _value_fault(n, int(v[i]), rules)
    (width, _), (height, _) = bounds("width"), bounds("height")
    yield (
        frozenset({"width", "height"}),
        width * height < rules.min_pixels,
        lambda i: (
            f"size {width[i]}x{height[i]} is too small for the watermark, which needs {rules.min_pixels:,} pixels; "
            "use 256x256 or more, or watermark none"
        ),
    )
    eta = bounds("eta")[1]
    for sampler, drawn in _samplers(columns, count, rules):
        if sampler not in SAMPLERS_WITH_ETA:
            yield (
                frozenset({"sampler", "eta"}),
                drawn & (eta != 0),
                lambda i, s=sampler: (
                    f"eta {eta[i]:g} does not go with sampler {s}, whose noise is its own; "
                    f"use eta 0 or sampler {' or '.join(SAMPLERS_WITH_ETA)}"
                ),
            )
        for steps in _distinct_steps(columns, rules):
            fault = rules.steps_fault(sampler, steps)
            if fault is not None:
                taken = bounds("num_inference_steps")[0] == steps
                bad = drawn if "num_inference_steps" in rules.axes else drawn & taken
                yield frozenset({"sampler", "num_inference_steps"}), bad, lambda _, f=fault: f
    images = bounds("num_images")[1]
    if "seed" in rules.axes or "seed" in columns:
        seeds = (
            bounds("seed")[1] if "seed" in rules.axes else columns["seed"].fill_null(0).to_numpy(zero_copy_only=False)
        )
        yield (
            frozenset({"seed", "num_images"}),
            seeds + images > SEED_LIMIT,
            lambda i: f"seed {seeds[i]} with num_images {images[i]} runs past {SEED_LIMIT - 1}; lower one of them",
        )


def _samplers(columns: Mapping[str, pa.Array], count: int, rules: Rules) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each sampler with the rows that it draws, in at least one combination of the axes."""
    if "sampler" in rules.axes or "sampler" not in columns:
        for sampler in rules.axes.get("sampler", (rules.defaults["sampler"],)):
            yield str(sampler), np.full(count, fill_value=True)
        return
    filled = columns["sampler"].fill_null(rules.defaults["sampler"])
    for sampler in filled.unique().to_pylist():
        yield sampler, np.asarray(pc.equal(filled, sampler).to_numpy(zero_copy_only=False), dtype=bool)


def _distinct_steps(columns: Mapping[str, pa.Array], rules: Rules) -> list[int]:
    name = "num_inference_steps"
    if name in rules.axes or name not in columns:
        return [int(steps) for steps in rules.axes.get(name, (rules.defaults[name],))]
    return [int(steps) for steps in columns[name].fill_null(rules.defaults[name]).unique().to_pylist()]


def _check_lengths(
    columns: Mapping[str, pa.Array], rules: Rules, tokens: TokenCounter, faults: dict[int, list[str]]
) -> None:
    """A fault for each sound row whose prompt or own negative prompt has too many tokens; the counter counts them."""
    for name in ("prompt", "negative_prompt"):
        if name not in columns or name in rules.axes:
            continue
        column = columns[name] if name == "prompt" else columns[name].fill_null(rules.defaults[name])
        for index, count in enumerate(tokens.counts(column)):
            fault = tokens.fault(name, count)
            if fault is not None and index not in faults:
                tokens.refused += 1
                faults[index] = [fault]


def _length_fault(name: str, value: Value, rules: Rules) -> str | None:
    """Why an axis value or default of the negative prompt is too long, or None."""
    if rules.tokens is None or name != "negative_prompt":
        return None
    return rules.tokens.fault(name, rules.tokens.count(str(value)))


def _value_fault(name: str, value: Value, rules: Rules) -> str | None:
    """Why the model refuses one value, or None."""
    if name in {"width", "height"} and isinstance(value, int) and value % rules.factor:
        below, above = value // rules.factor * rules.factor, (value // rules.factor + 1) * rules.factor
        near = f"{below} or {above}" if below else f"{above}"
        return f"{name} {value} is not a multiple of {rules.factor}, the model's factor; use {near}"
    return None


def _excerpt(prompts: Any, index: int) -> str:
    """The start of a rejected prompt, as data: nothing in it is trusted."""
    if prompts is None:
        return ""
    value = prompts[index] if isinstance(prompts, list) else _to_pylist(prompts[index : index + 1])[0]
    text = value if isinstance(value, str) else "" if value is None else shorten(value, EXCERPT_CHARACTERS)
    return text[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
