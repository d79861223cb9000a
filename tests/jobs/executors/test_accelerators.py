"""Which GPUs a job may use, told from what `ray.nodes()` reports; the first node is one that Ray 2.60 reported."""

from __future__ import annotations

from typing import Any

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.executors.accelerators import Accelerators, choose_accelerators

H100 = {
    "NodeID": "b0e755160fbb433be0f3aa2418a266ce07f3e177e23c14533b6102c3",
    "Alive": True,
    "NodeManagerHostname": "gpu-1",
    "Resources": {
        "node:10.0.0.2": 1.0,
        "object_store_memory": 7e9,
        "GPU": 8.0,
        "CPU": 64.0,
        "accelerator_type:H100": 1.0,
    },
    "Labels": {"ray.io/accelerator-type": "H100", "ray.io/node-id": "b0e755160fbb433be0f3aa24"},
}
HEAD = {"Alive": True, "Resources": {"CPU": 4.0, "node:__internal_head__": 1.0}, "Labels": {"ray.io/node-id": "aa"}}
DEAD = {"Alive": False, "Resources": {}, "Labels": {}}


def gpu_node(gpus: float, *, resource: str | None = None, label: str | None = None) -> dict[str, Any]:
    resources = {"CPU": 16.0, "GPU": gpus} | ({f"accelerator_type:{resource}": 1.0} if resource else {})
    return {"Alive": True, "Resources": resources, "Labels": {"ray.io/accelerator-type": label} if label else {}}


A100, L4 = gpu_node(4.0, resource="A100", label="A100"), gpu_node(1.0, resource="L4", label="L4")


def test_one_type_is_pinned_so_that_nodes_of_another_may_join():
    pinned = Accelerators(type="H100", gpus=16.0, resources={"accelerator_type:H100": 0.001})
    assert choose_accelerators([HEAD, H100, H100, DEAD]) == pinned
    assert choose_accelerators([HEAD, H100, H100, DEAD], allow_mixed=True) == pinned


def test_several_types_are_refused_with_both_remedies():
    with pytest.raises(UsageError) as caught:
        choose_accelerators([HEAD, H100, A100, A100, L4, DEAD])
    message = str(caught.value)
    for word in ("A100 (8 in all)", "H100 (8 in all)", "L4 (1 in all)"):
        assert word in message
    assert "--accelerator-type A100" in message
    assert "--allow-mixed-accelerators" in message
    assert "\n" not in message


def test_the_chosen_type_is_counted_alone_whatever_its_case():
    chosen = choose_accelerators([HEAD, H100, A100, A100], wanted="a100")
    assert chosen == Accelerators(type="A100", gpus=8.0, resources={"accelerator_type:A100": 0.001})


def test_mixed_types_may_be_allowed():
    assert choose_accelerators([HEAD, H100, A100, L4], allow_mixed=True) == Accelerators(type=None, gpus=13.0)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([HEAD, A100, L4], ["'H100'", "A100 (4 in all), L4 (1 in all)", "add nodes of that type"]),
        ([HEAD, gpu_node(2.0)], ["'H100'", "a type that Ray does not know (2 in all)"]),
        ([HEAD], ["'H100'", "no GPU"]),
        ([HEAD, {**H100, "Alive": False}], ["no GPU"]),
    ],
)
def test_a_type_that_there_is_not_is_refused(nodes, words):
    with pytest.raises(UsageError) as caught:
        choose_accelerators(nodes, wanted="H100")
    assert all(word in str(caught.value) for word in words)


def test_gpus_of_no_known_type_are_a_type_of_their_own():
    assert choose_accelerators([HEAD, gpu_node(2.0), gpu_node(1.0)]) == Accelerators(type=None, gpus=3.0)
    with pytest.raises(UsageError, match=r"a type that Ray does not know \(2 in all\).*--accelerator-type H100"):
        choose_accelerators([H100, gpu_node(2.0)])


def test_a_type_told_by_a_label_alone_is_asked_for_by_the_label():
    nodes = [HEAD, gpu_node(2.0, label="MI300X"), H100]
    chosen = Accelerators(type="MI300X", gpus=2.0, label_selector={"ray.io/accelerator-type": "MI300X"})
    assert choose_accelerators(nodes, wanted="MI300X") == chosen


def test_a_cluster_without_gpus_has_none_to_choose():
    assert choose_accelerators([HEAD, DEAD]) == Accelerators(type=None, gpus=0.0)
