"""How many actors a job may have, and what each of them and of the tasks that postprocess asks of the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.accelerators import Accelerators, choose_accelerators
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.spec import Runtime

CPU_POSTPROCESS, GPU_POSTPROCESS = 0.0, 0.5
"""CPUs of a task that postprocesses. None beside actors on CPUs: Ray Data gives every stage that asks for CPUs an equal
share of them, used or not, so that actors would never be started on a node that joins. Half a core beside GPUs."""

FEWEST_TASKS = 2

UNBOUNDED = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """`initial` actors fit the cluster as it is; up to `maximum` are started as nodes join. The rest is per process.

    `postprocess_tasks`: so many at once, where they ask for no CPU that would bound them; else None.
    """

    initial: int
    maximum: int
    cpus: float
    gpus: float
    postprocess_cpus: float
    postprocess_tasks: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    label_selector: Mapping[str, str] = field(default_factory=dict)


def size_pool(plan: Plan, runtime: Runtime, nodes: Iterable[Mapping[str, Any]], *, growing: bool) -> Pool:
    """Actors for every GPU of one type, else for every `threads_per_actor` cores.

    `growing`: nodes may join. Raises JobError for what can never be scheduled, UsageError for several types of GPU.
    """
    alive = [node for node in nodes if node.get("Alive")]
    chosen = _accelerators(plan, runtime, alive)
    have_cpus = sum(node["Resources"].get("CPU", 0.0) for node in alive)
    awaited = growing and runtime.num_actors is not None  # an autoscaler brings nodes once something asks for them
    if plan.settings.device == "cuda" and not chosen.gpus and not awaited:
        raise JobError(
            "device is cuda but the Ray cluster has no GPU; add GPU nodes, give --num-actors if an autoscaler brings "
            "them, or plan the job with device cpu"
        )
    on_gpu = plan.settings.device == "cuda" or (
        chosen.gpus > 0 and plan.settings.device != "cpu" and runtime.gpus_per_actor != 0
    )
    if runtime.gpus_per_actor and not on_gpu:
        raise JobError(
            f"gpus_per_actor is {runtime.gpus_per_actor:g} but the job can use no GPU here (the cluster has "
            f"{chosen.gpus:g}, device is {plan.settings.device}); leave gpus_per_actor out"
        )
    gpus = (runtime.gpus_per_actor or 1.0) if on_gpu else 0.0
    cpus = runtime.cpus_per_actor
    if cpus is None:
        cpus = 0.0 if on_gpu else float(plan.settings.threads_per_actor or 1)
    postprocess = GPU_POSTPROCESS if on_gpu else CPU_POSTPROCESS
    fits = _fitting([node["Resources"] for node in alive if _is_of(node, chosen)], cpus, gpus)
    if fits and have_cpus - fits * cpus < postprocess - 1e-6:
        fits -= 1
    if not fits and not awaited:
        raise JobError(
            f"an actor asks for {cpus:g} CPUs and {gpus:g} GPUs of one node, and postprocessing for {postprocess:g}, "
            f"but the cluster has {have_cpus:g} CPUs and {chosen.gpus:g} GPUs on {len(alive)} node(s); lower "
            f"cpus_per_actor or gpus_per_actor, or use a larger cluster"
        )
    maximum = runtime.num_actors or (UNBOUNDED if growing else fits)
    return Pool(
        initial=max(1, min(fits, maximum)),
        maximum=maximum,
        cpus=cpus,
        gpus=gpus,
        postprocess_cpus=postprocess,
        postprocess_tasks=None if postprocess else max(2 * FEWEST_TASKS if growing else FEWEST_TASKS, fits),
        resources=chosen.resources if on_gpu else {},
        label_selector=chosen.label_selector if on_gpu else {},
    )


def _accelerators(plan: Plan, runtime: Runtime, nodes: Iterable[Mapping[str, Any]]) -> Accelerators:
    if plan.settings.device == "cpu":
        if runtime.accelerator_type is not None:
            raise UsageError(
                f"accelerator_type is {runtime.accelerator_type} but the job is planned for the CPU; leave it out, or "
                f"plan the job with device cuda"
            )
        return Accelerators(type=None, gpus=0.0)
    return choose_accelerators(nodes, wanted=runtime.accelerator_type, allow_mixed=runtime.allow_mixed_accelerators)


def _is_of(node: Mapping[str, Any], chosen: Accelerators) -> bool:
    """Whether the node has GPUs of the chosen type, if one was chosen."""
    labels = node.get("Labels", {})
    return all(name in node["Resources"] for name in chosen.resources) and all(
        labels.get(name) == value for name, value in chosen.label_selector.items()
    )


def _fitting(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many actors fit the nodes as they are."""
    return sum(min(_times(node, "CPU", cpus), _times(node, "GPU", gpus)) for node in nodes)


def _times(node: Mapping[str, float], name: str, each: float) -> int:
    return int((node.get(name, 0.0) + 1e-6) // each) if each else UNBOUNDED
