"""The arithmetic of a pool: what fits a cluster, what may come, and what is refused instead of waiting for ever."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.pool import UNBOUNDED, Pool, size_pool
from latentmill.jobs.spec import Runtime


def plan_like(**changes) -> SimpleNamespace:
    return SimpleNamespace(settings=SimpleNamespace(**{"device": "cpu", "threads_per_actor": 1, **changes}))


CUDA = plan_like(device="cuda")


def nodes(*resources: dict[str, float]) -> list[dict]:
    return [{"Alive": True, "Resources": entry} for entry in resources]


def pool(cluster: list[dict], plan: SimpleNamespace | None = None, *, growing: bool = False, **runtime) -> Pool:
    return size_pool(plan or plan_like(), Runtime(**runtime), cluster, growing=growing)


@pytest.mark.parametrize(
    ("cluster", "threads", "actors"),
    [
        (nodes({"CPU": 2.0}), 1, 2),
        (nodes({"CPU": 1.0}), 1, 1),
        (nodes({"CPU": 16.0}), 1, 16),
        (nodes({"CPU": 16.0}), 4, 4),
        (nodes({"CPU": 2.0}, {"CPU": 2.0}), 1, 4),
        (nodes({"CPU": 3.0}, {"CPU": 3.0}), 2, 2),
    ],
)
def test_one_actor_for_so_many_cores(cluster, threads: int, actors: int):
    sized = pool(cluster, plan_like(threads_per_actor=threads))
    assert (sized.initial, sized.maximum, sized.gpus) == (actors, actors, 0.0)


def test_on_gpus_there_is_an_actor_for_each_on_the_node_that_has_them():
    assert pool(nodes({"CPU": 16.0, "GPU": 8.0}), CUDA).initial == 8
    assert pool(nodes({"CPU": 16.0, "GPU": 2.0}), CUDA, gpus_per_actor=0.5).initial == 4
    assert pool(nodes({"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}), CUDA).initial == 4
    sized = pool(nodes({"CPU": 16.0, "GPU": 8.0}), CUDA, num_actors=2, cpus_per_actor=4)
    assert (sized.initial, sized.maximum, sized.cpus, sized.gpus) == (2, 2, 4.0, 1.0)


def test_a_plan_for_the_cpu_leaves_gpus_alone():
    assert pool(nodes({"CPU": 4.0, "GPU": 1.0, "accelerator_type:H100": 1.0})).gpus == 0.0
    with pytest.raises(UsageError, match="planned for the CPU"):
        pool(nodes({"CPU": 4.0, "GPU": 1.0}), accelerator_type="H100")


def test_a_type_of_gpu_is_pinned_and_others_are_not_counted():
    mixed = nodes(
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0}, {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0}
    )
    with pytest.raises(UsageError, match="several types"):
        pool(mixed, CUDA)
    chosen = pool(mixed, CUDA, accelerator_type="A100")
    assert chosen.initial == 2
    assert chosen.resources == {"accelerator_type:A100": 0.001}
    assert pool(mixed, CUDA, allow_mixed_accelerators=True).initial == 6


def test_a_joined_cluster_may_grow_and_num_actors_bounds_it():
    assert pool(nodes({"CPU": 2.0}), growing=True).maximum == UNBOUNDED
    bounded = pool(nodes({"CPU": 2.0}), growing=True, num_actors=6)
    assert (bounded.initial, bounded.maximum, bounded.awaited) == (2, 6, 6)
    awaited = pool(nodes({"CPU": 2.0}), CUDA, growing=True, num_actors=6)
    assert (awaited.initial, awaited.maximum, awaited.awaited, awaited.gpus) == (1, 6, 6, 1.0)


def test_nodes_that_join_or_die_change_what_fits():
    sized = pool(nodes({"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}), CUDA, growing=True)
    later = nodes(
        {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0},
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0},
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0},
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0},
    )
    later[3]["Alive"] = False
    assert (sized.initial, sized.awaited, sized.fits(later)) == (2, None, 6)


@pytest.mark.parametrize(
    ("cluster", "plan", "runtime", "words"),
    [
        (nodes({"CPU": 8.0}), CUDA, {}, "device is cuda but the Ray cluster has no GPU"),
        (nodes({"CPU": 8.0}), None, {"cpus_per_actor": 9}, "lower cpus_per_actor"),
        (nodes({"CPU": 4.0}, {"CPU": 4.0}), None, {"cpus_per_actor": 5}, "on 2 node"),
        (nodes({"CPU": 8.0}), None, {"gpus_per_actor": 1}, "leave gpus_per_actor out"),
        (nodes({"CPU": 8.0, "GPU": 1.0}), CUDA, {"gpus_per_actor": 2}, "has 8 CPUs and 1 GPUs"),
    ],
)
def test_what_can_never_be_scheduled_is_refused_instead_of_waiting_for_ever(cluster, plan, runtime, words):
    with pytest.raises(JobError, match=words):
        pool(cluster, plan, **runtime)
