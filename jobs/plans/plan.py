"""An output's plan: published once, then resumed, or refused with the differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.plans.columns import formats
from latentmill.jobs.plans.draft import DraftPlan
from latentmill.jobs.plans.identity import in_words_of
from latentmill.jobs.plans.planned import (
    MAX_PLAN_BYTES,
    PLAN_PATH,
    REJECTED_PATH,
    Plan,
    canonical,
    fingerprint,
    parse_plan,
    part_path,
    wildcards_path,
)
from latentmill.jobs.plans.planning import draft_plan
from latentmill.jobs.plans.sample import PlannedSample
from latentmill.jobs.store.urls import display_url

if TYPE_CHECKING:
    from latentmill.jobs.store.storage import Storage

__all__ = ["DraftPlan", "Plan", "PlannedSample", "adopt", "draft_plan", "load_plan"]


def adopt(draft: DraftPlan, storage: Storage) -> Plan:
    """Afterwards the output has this plan and its rejected rows, published now or by an earlier start.

    Raises OutputConflictError if the output belongs to another plan, and then changes nothing that it needs.
    """
    existing = _read_plan(storage)
    if existing is None:
        for part in range(len(draft.snapshot.parts)):
            storage.create(part_path(draft.digest, part), draft.snapshot.path(part).read_bytes())
        if draft.wildcards is not None:
            storage.create(wildcards_path(draft.identity["wildcards"]), draft.wildcards)
        storage.create(PLAN_PATH, canonical(draft.document()).encode())
        existing = load_plan(storage)  # this draft's, or another driver's that was faster
    plan = _same_plan(draft, existing)
    if not storage.exists(REJECTED_PATH):
        # after the plan: all plans use this name, and drivers with another plan have been refused by now
        storage.create(REJECTED_PATH, draft.rejects.path.read_bytes())
    return plan


def load_plan(storage: Storage) -> Plan:
    """The output's plan. Raises UsageError if it has none."""
    plan = _read_plan(storage)
    if plan is None:
        raise UsageError(f"{storage.url} has no plan; start one with: latentmill run PROMPTS --out {storage.url}")
    return plan


def _read_plan(storage: Storage) -> Plan | None:
    try:
        data = storage.read(PLAN_PATH, MAX_PLAN_BYTES)
    except FileNotFoundError:
        return None
    return parse_plan(data, storage)


def _same_plan(draft: DraftPlan, existing: Plan) -> Plan:
    if existing.format_version != formats()[-1]:
        raise OutputConflictError(
            f"{display_url(draft.spec.out)} was begun by latentmill {existing.versions['latentmill']} in format "
            f"{existing.format_version}, which this version reads but does not go on with; use another --out, or the "
            f"version that began it"
        )
    identity = dict(draft.identity)
    if draft.spec.threads_per_actor is None:
        # not asked for, only derived from this machine: a resumed job keeps its own
        identity["threads_per_actor"] = existing.settings.threads_per_actor
    if existing.identity.get("format") == "files":
        identity["format"] = "files"  # an older version wrote its --format here; pictures are always files
    identity = in_words_of(existing.identity, identity)
    if fingerprint(identity) == existing.plan_hash:
        return existing
    differences = list(differences_of(existing.identity, identity))
    shown = "; ".join(differences[:6]) + ("; …" if len(differences) > 6 else "")
    raise OutputConflictError(
        f"{display_url(draft.spec.out)} belongs to another plan: {shown}. Use another --out, or the old settings"
    )


def differences_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """`field: old -> new` for every field in which the identities of two plans differ."""
    before, after = _flat(old), _flat(new)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name}: {shorten(before.get(name, 'absent'), 40)} -> {shorten(after.get(name, 'absent'), 40)}"


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat = {
        key: value
        for key, value in identity.items()
        if key not in {"model_files", "parameters", "axes", "manifest", "zip", "wildcards", "models"}
    }
    if "zip" in identity:
        flat["zip"] = "; ".join(",".join(names) for names in identity["zip"])
    if "wildcards" in identity:
        flat["wildcards (digest)"] = identity["wildcards"][:12]
    flat |= {f"model file {name}": digest[:12] for name, digest in identity["model_files"].items()}
    for number, model in enumerate(identity.get("models", ()), start=1):
        digest, others = fingerprint(model["model_files"]), (model["prediction_type"], model["timestep_spacing"])
        flat[f"model {number}"] = f"{digest[:12]} {others[0]} {others[1]}"
    flat |= identity["parameters"]
    flat |= {f"sweep {name}": ",".join(map(str, values)) for name, values in identity["axes"]}
    if len(identity["axes"]) > 1:
        flat["axis order"] = ",".join(name for name, _ in identity["axes"])
    flat["manifest rows (digest)"] = identity["manifest"][:12]
    return flat
