"""Outputs that may have pictures for another job: what must be the same in both, and where they are.

An output is a donor if everything that its job could change in a picture, besides each sample's own request, is the
same as here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmill.jobs.chunk_result import describe_fault
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.manifests.fields import FIELDS, shorten
from latentmill.jobs.plans.columns import Column, columns_of
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.plans.planned import PLAN_PATH
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import allowed_filesystem, display_url, place_of

MAX_DONOR_SAMPLES = 10_000_000
"""The largest output that cells are taken from: a worker's index of it takes about 500 bytes a row."""

_OF_THE_ROWS = frozenset(["parameters", "axes", "manifest", "zip", "template", "wildcards", "loras"])
"""What of a plan's identity has become each sample's own request."""
_OF_NO_PICTURE = frozenset(["chunk_size", "format"])
"""What of it cuts the work, and changes no picture."""
_OF_MODELS = frozenset(["model_files", "models"])
"""What of it says which models there are: a cell is of one."""
_NAMES = frozenset(["sample_id", "row_id", "init_image", "mask"])
"""What of a row only says how something is called: files count by their digests."""
_POINTER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Donors:
    """Outputs that may have cells for a job, and what should be told of the others."""

    urls: tuple[str, ...]
    notes: tuple[str, ...]

    def of(self, plan: Plan) -> Donors:
        """Those among them that may have pictures of one of this plan's models."""
        urls, notes = [], list(self.notes)
        for url in self.urls:
            try:
                reason = _why_none(plan, open_job(url).plan)
            except JobError as error:
                reason = str(error)
            if reason is None:
                urls.append(url)
            else:
                notes.append(nothing_from(url, reason))
        return Donors(tuple(urls), tuple(notes))


def find_donors(named: Sequence[str], out_url: str, *, link: bool = False) -> Donors:
    """The outputs that are named, and those that a `latest.json` leads to.

    Raises UsageError for one that cannot be read, or whose files cannot be linked where that is wanted, unless the job
    was begun already: then it goes on without.
    """
    urls, notes, begun = [], [], bool(named) and Storage.open(out_url).exists(PLAN_PATH)
    for name in named:
        try:
            url = _pointed(name)
            if place_of(url) == place_of(out_url):
                notes.append(nothing_from(name, "it leads to this output itself"))
                continue
            open_job(url)
            if link and not _on_one_disk(url, out_url):
                raise UsageError("its files are on another disk than out, or in a bucket; say --reuse-by copy")
        except JobError as error:
            if not begun:
                raise UsageError(f"reuse {display_url(name)}: {error}") from error
            notes.append(nothing_from(name, str(error)))
            continue
        urls.append(url if "://" in url else allowed_filesystem(url)[1])
    return Donors(tuple(dict.fromkeys(urls)), tuple(notes))


def _pointed(name: str) -> str:
    """The output that a pointer names; any other name as it is."""
    folder, _, file = name.rpartition("/")
    if not file.endswith(".json"):
        return name
    try:
        out = json.loads(Storage.open(folder or ".").read(file, _POINTER_BYTES))["out"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{display_url(name)} is no pointer to an output: {describe_fault(error)}") from error
    return str(out)


def _on_one_disk(url: str, out_url: str) -> bool:
    (protocol, donor), (own_protocol, own) = place_of(url), place_of(out_url)
    if (protocol, own_protocol) != ("file", "file"):
        return False
    there = next(folder for folder in (Path(own), *Path(own).parents) if folder.exists())
    return Path(donor).stat().st_dev == there.stat().st_dev


def nothing_from(url: str, reason: str) -> str:
    return f"nothing is taken from {display_url(url)}: {reason}"


def request_columns(plan: Plan) -> tuple[Column, ...]:
    """The columns that say what was asked for: all that a picture follows from besides its job.

    Those of images are among them, also where no row has one.
    """
    columns = columns_of(plan.format_version, FIELDS)
    return tuple(column for column in columns if column.source == "sample" and column.name not in _NAMES)


def _why_none(plan: Plan, donor: Plan) -> str | None:
    """The first model's reason, if each model has one."""
    reasons = [why_not(plan.of_model(number), donor) for number in range(len(plan.models))]
    return None if None in reasons else reasons[0]


def why_not(plan: Plan, donor: Plan) -> str | None:
    """Why no picture of that plan can be one of ours, by our plan's `model`; None if there may be some."""
    if donor.n_samples > MAX_DONOR_SAMPLES:
        return f"it has {donor.n_samples:,} samples, and cells are taken from at most {MAX_DONOR_SAMPLES:,}"
    ours = _conditions(plan)
    each = [_conditions(donor.of_model(number)) for number in range(len(donor.models))]
    theirs = ours if ours in each else each[0]
    differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if not differing:
        return None
    shown = [f"{name}: {shorten(theirs.get(name), 40)} there, {shorten(ours.get(name), 40)} here" for name in differing]
    return "; ".join(shown[:3]) + ("; ..." if len(shown) > 3 else "")


def _conditions(plan: Plan) -> dict[str, Any]:
    """All that decides a picture but for its own request and what the device adds to it."""
    left_out = {*_OF_THE_ROWS, *_OF_NO_PICTURE, *_OF_MODELS}
    shared = {name: value for name, value in plan.identity.items() if name not in left_out}
    columns = ",".join(column.name for column in request_columns(plan))
    model = {
        "model": plan.model.digest,
        "prediction_type": plan.model.predicts,
        "timestep_spacing": plan.model.spacing,
    }
    return {**shared, **model, "version": plan.versions["latentmill"], "request": columns}
