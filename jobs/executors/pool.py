"""How many actors a job may have, and what each of them asks of the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.accelerators import Accelerators, choose_accelerators
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.spec import Runtime

CPUS_BESIDE_GPU = 0.5
"""CPUs that an actor asks for beside its GPU: about what postprocessing takes."""

UNBOUNDED = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """`initial` actors fit the cluster as it is; up to `maximum` are started as nodes join. The rest is per process.

    `awaited`: so many are asked for at once, fitting or not, for an autoscaler brings nodes for those that wait.
    """

    initial: int
    maximum: int
    cpus: float
    gpus: float
    awaited: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def fits(self, nodes: Iterable[Mapping[str, Any]]) -> int:
        """How many actors the living ones of `ray.nodes()` have room for."""
        return sum(
            min(_times(node["Resources"], "CPU", self.cpus), _times(node["Resources"], "GPU", self.gpus))
            for node in nodes
            if node.get("Alive") and self._takes(node)
        )

    def _takes(self, node: Mapping[str, Any]) -> bool:
        """Whether the node has GPUs of the chosen type, if one was chosen."""
        labels = node.get("Labels", {})
        return all(name in node["Resources"] for name in self.resources) and all(
            labels.get(name) == value for name, value in self.label_selector.items()
        )


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
        cpus = CPUS_BESIDE_GPU if on_gpu else float(plan.settings.threads_per_actor or 1)
    pool = Pool(
        initial=1,
        maximum=1,
        cpus=cpus,
        gpus=gpus,
        awaited=runtime.num_actors if awaited else None,
        resources=chosen.resources if on_gpu else {},
        label_selector=chosen.label_selector if on_gpu else {},
    )
    fits = pool.fits(alive)
    if not fits and not awaited:
        raise JobError(
            f"an actor asks for {cpus:g} CPUs and {gpus:g} GPUs of one node, but the cluster has {have_cpus:g} CPUs "
            f"and {chosen.gpus:g} GPUs on {len(alive)} node(s); lower cpus_per_actor or gpus_per_actor, or use a "
            f"larger cluster"
        )
    maximum = runtime.num_actors or (UNBOUNDED if growing else fits)
    return replace(pool, initial=max(1, min(fits, maximum)), maximum=maximum)


def _accelerators(plan: Plan, runtime: Runtime, nodes: Iterable[Mapping[str, Any]]) -> Accelerators:
    if plan.settings.device == "cpu":
        if runtime.accelerator_type is not None:
            raise UsageError(
                f"accelerator_type is {runtime.accelerator_type} but the job is planned for the CPU; leave it out, or "
                f"plan the job with device cuda"
            )
        return Accelerators(type=None, gpus=0.0)
    return choose_accelerators(nodes, wanted=runtime.accelerator_type, allow_mixed=runtime.allow_mixed_accelerators)


def _times(node: Mapping[str, float], name: str, each: float) -> int:
    return int((node.get(name, 0.0) + 1e-6) // each) if each else UNBOUNDED
