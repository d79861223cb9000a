"""One job from a job file and flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentmill.jobs.dated import dated_output
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axes import parse_axis
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.spec import SETTINGS, JobSpec, make_spec, unknown_setting
from latentmill.jobs.store.inputs import read_small
from latentmill.jobs.store.urls import display_url

if TYPE_CHECKING:
    import datetime

MAX_JOB_FILE_BYTES = 1_000_000
SAMPLE_MANIFEST = Path(__file__).parents[1] / "configs" / "prompts" / "sample.txt"
"""The prompts in the package, which are drawn where none are named."""
_EXAMPLES = "see configs/jobs for examples"
BLANK_MANIFEST = SAMPLE_MANIFEST.with_name("blank.jsonl")
"""One row without a text: what is drawn where no prompts are named, but an axis has some."""


def load_job_file(path: str) -> dict[str, Any]:
    """The job file's keys, flat, unknown ones refused with the nearest known one."""
    import yaml

    shown = f"job file {display_url(path)}"
    data = read_small(path, shown, MAX_JOB_FILE_BYTES, remedy=_EXAMPLES, too_large="is it a manifest?")
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise UsageError(f"{shown} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{shown} is not a mapping of keys to values; {_EXAMPLES}")
    flat = _flatten(content)
    for key in flat:
        if key not in SETTINGS:
            raise UsageError(f"{shown}: {unknown_setting(key)}")
    if "sweep" in flat and not isinstance(flat["sweep"], Mapping):
        raise UsageError(f"{shown}: sweep is {shorten(flat['sweep'])}, expected a mapping of axes to lists of values")
    return flat


def resolve(
    job_file: str | None, flags: Mapping[str, Any], *, today: datetime.date | None = None, or_sample: bool = False
) -> JobSpec:
    """The job: the file's keys, overridden by every flag that is not None.

    `flags["sweep"]` is `AXIS=VALUES` or a list of them, or a mapping of axes to their values; an axis given by flag
    replaces the file's axis of that name and keeps its place, and the file's other axes stay. `{date}` in `out` is
    replaced by the key `date`, else by `today`, by default the day in UTC. A job with a prompt axis needs no prompts.
    With `or_sample`, a job without a file and without prompts draws the package's sample.
    """
    merged = load_job_file(job_file) if job_file is not None else {}
    given = {key: value for key, value in flags.items() if value is not None}
    axes = given.pop("sweep", None)
    if axes:
        merged["sweep"] = _merge_axes(merged.get("sweep"), axes)
    if not given.get("prompts", True):
        given.pop("prompts")
    merged.update(_flatten(given))
    if "prompts" not in merged and "prompt" in (merged.get("sweep") or ()):
        merged["prompts"] = [str(BLANK_MANIFEST)]
    is_sample = or_sample and job_file is None and "prompts" not in merged
    if is_sample:
        merged["prompts"] = [str(SAMPLE_MANIFEST)]
    dated = dated_output(str(merged.get("out", "")), merged.pop("date", None), today)
    if dated is not None:
        merged |= {"out": dated.out, "date": dated.date}
    return dataclasses.replace(make_spec(merged), dated=dated, is_sample=is_sample)


def _merge_axes(from_file: Mapping[str, Any] | None, flags: Any) -> dict[str, Any]:
    axes: dict[str, Any] = dict(from_file or {})
    if isinstance(flags, Mapping):
        return {**axes, **flags}
    if not isinstance(flags, str | list | tuple):
        raise UsageError(f"sweep is {shorten(flags)}, expected a mapping of axes to values, or a list of AXIS=VALUES")
    seen: set[str] = set()
    for flag in [flags] if isinstance(flags, str) else flags:
        name, values = parse_axis(str(flag))
        if name in seen:
            raise UsageError(f"--sweep {name} is given twice; list all its values in one: {name}=a,b,c")
        seen.add(name)
        axes[name] = values
    return axes


def _flatten(content: Mapping[Any, Any]) -> dict[Any, Any]:
    runtime = content.get("runtime")
    rest = {key: value for key, value in content.items() if key != "runtime" or not isinstance(runtime, Mapping)}
    return {**rest, **runtime} if isinstance(runtime, Mapping) else rest
