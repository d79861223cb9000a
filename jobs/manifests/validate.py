"""Every row checked against the limits of fields, model and job: vectorised, with a reason for each reject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.coerce import ARROW_TYPES, carry, coerce, to_pylist
from latentmill.jobs.manifests.fields import FIELDS, MODEL, shorten
from latentmill.jobs.manifests.image_rows import DIGESTS
from latentmill.jobs.manifests.readers import RowBatch
from latentmill.jobs.manifests.replacements import FIELDS_WITH_TEXT
from latentmill.jobs.manifests.rules import Rules, length_fault, pair_rules, value_fault
from latentmill.jobs.manifests.tokens import TokenCounter

EXCERPT_CHARACTERS = 200
CARRIED_PREFIX = "carried."
"""The prefix of carried columns in the snapshot, so that their names never equal those of its other columns."""


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


VARIANTS = "variants"
"""The column of the snapshot that says how many prompts a row's template stands for."""


def snapshot_schema(own: tuple[str, ...], carried: pa.Schema, *, variants: bool = False) -> pa.Schema:
    """Columns of the snapshot: the row's number and id, the parameters that the manifest gives, the carried columns.

    Of files that rows name, also their digests. With `variants`, also how many prompts each row stands for.
    """
    counted = [pa.field(VARIANTS, pa.int64())] if variants else []
    types = {name: pa.int64() if name == MODEL else ARROW_TYPES[FIELDS[name].kind] for name in own}
    parameters = [pa.field(name, types[name]) for name in own if name != "id"]
    parameters += [pa.field(digest, pa.string()) for name, digest in DIGESTS.items() if name in own]
    carried_along = [pa.field(CARRIED_PREFIX + entry.name, entry.type) for entry in carried]
    return pa.schema(
        [pa.field("row_number", pa.int64()), pa.field("row_id", pa.string()), *counted, *parameters, *carried_along]
    )


def check_job(rules: Rules, own: tuple[str, ...]) -> None:
    """Refuse axis values, and defaults that no column overrides: no row can correct them."""
    for name, values in rules.axes.items():
        for value in values:
            fault = value_fault(name, value, rules) or length_fault(name, value, rules)
            if fault:
                raise UsageError(f"sweep axis {name}: {fault}")
    if "negative_prompt" not in own and "negative_prompt" not in rules.axes:
        value = rules.defaults["negative_prompt"]
        fault = value_fault("negative_prompt", value, rules) or length_fault("negative_prompt", value, rules)
        if fault:
            raise UsageError(fault)
    for fields, bad, reason in pair_rules({}, 1, rules):
        if bad.any() and not (fields - rules.axes.keys()) & set(own):
            raise UsageError(reason(0))


def validate(batch: RowBatch, offset: int, schema: pa.Schema, rules: Rules, folder: str = "") -> Checked:
    """Check one batch; a row's number is `offset` plus its number in its file. No row is both kept and rejected.

    Relative paths of images are relative to `folder`.
    """
    faults: dict[int, list[str]] = {index: [reason] for index, reason in batch.faults.items()}
    columns, count = _own_columns(batch, schema, faults), len(batch)
    _number_models(columns, rules, faults)
    for index in np.flatnonzero(columns["prompt"].is_null().to_numpy(zero_copy_only=False)):
        faults.setdefault(int(index), ["prompt is missing; write one ('' is a blank prompt), or leave the row out"])
    for entry in schema:
        if entry.name.startswith(CARRIED_PREFIX):
            name = entry.name.removeprefix(CARRIED_PREFIX)
            columns[entry.name] = carry(name, entry.type, batch.columns.get(name), count, faults)
    if rules.images is not None:
        rules.images.add(columns, folder, faults)
    for _, bad, reason in pair_rules(columns, count, rules):
        for index in np.flatnonzero(bad):
            faults.setdefault(int(index), [reason(int(index))])
    _check_texts(columns, rules, faults)
    if VARIANTS in schema.names:
        prompts = enumerate(to_pylist(columns["prompt"]))
        counts = [1 if index in faults else rules.texts.variants(text) for index, text in prompts]
        columns[VARIANTS] = pa.array(counts, pa.int64())
    for row, fault in rules.loras.faults(columns):
        faults.setdefault(row, [fault])
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


def _own_columns(batch: RowBatch, schema: pa.Schema, faults: dict[int, list[str]]) -> dict[str, pa.Array]:
    """The parameters that the batch gives, and null for those that only other batches give."""
    columns: dict[str, pa.Array] = {}
    for name in FIELDS:
        if name in batch.columns:
            columns[name] = coerce(FIELDS[name], batch.columns[name], faults)
        elif name in schema.names:
            columns[name] = pa.nulls(len(batch), schema.field(name).type)
    return columns


def _number_models(columns: dict[str, pa.Array], rules: Rules, faults: dict[int, list[str]]) -> None:
    """The number of each row's model in place of its name; a row whose model cannot be used gets the reason.

    An axis leaves all at 0.
    """
    names = columns.get(MODEL)
    if names is None:
        return
    if MODEL in rules.axes or pa.types.is_integer(names.type):
        columns[MODEL] = pa.array(np.zeros(len(names), dtype=np.int64))
        return
    filled = names.fill_null(rules.default_model).to_pylist()
    for index, name in enumerate(filled):
        if name not in rules.models:
            faults.setdefault(index, [rules.unusable_models.get(name, f"model {shorten(name)} was not found")])
    columns[MODEL] = pa.array([rules.models.get(name, 0) for name in filled], pa.int64())


def _check_texts(columns: Mapping[str, pa.Array], rules: Rules, faults: dict[int, list[str]]) -> None:
    """A fault for each valid row with a template that cannot be expanded, or that would become too long."""
    for name in FIELDS_WITH_TEXT:
        if name not in columns or name in rules.axes or not rules.texts.changes(name):
            continue
        for index, text in enumerate(columns[name].fill_null(rules.defaults.get(name, "")).to_pylist()):
            fault = None if index in faults else rules.texts.fault(name, text)
            if fault is not None:
                faults[index] = [fault]


def _check_lengths(
    columns: Mapping[str, pa.Array], rules: Rules, tokens: TokenCounter, faults: dict[int, list[str]]
) -> None:
    """A fault for each valid row whose prompt or negative prompt has too many tokens; `tokens.refused` counts them."""
    for name in ("prompt", "negative_prompt"):
        if name not in columns or name in rules.axes:
            continue
        column = columns[name] if name == "prompt" else columns[name].fill_null(rules.defaults[name])
        valid = pa.array([index not in faults for index in range(len(column))])
        for index, count in enumerate(tokens.counts(name, pc.if_else(valid, column, ""))):
            fault = tokens.fault(name, count)
            if fault is not None and index not in faults:
                tokens.refused += 1
                faults[index] = [fault]


def _excerpt(prompts: Any, index: int) -> str:
    """The start of a rejected prompt, as data: nothing in it is trusted."""
    if prompts is None:
        return ""
    value = prompts[index] if isinstance(prompts, list) else to_pylist(prompts[index : index + 1])[0]
    text = value if isinstance(value, str) else "" if value is None else shorten(value, EXCERPT_CHARACTERS)
    return text[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
