"""One process per core, each with one thread, gradients averaged over gloo.

On two cores this is about half again as fast as one process with two threads, whose threads wait for each other at
every layer, and it does not collapse when another program wants a core. On a GPU there is one process.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from training.devices import device

Worker = Callable[..., None]  # called with its rank, then the arguments given to `launch`


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def launch(worker: Worker, *arguments: Any, processes: int | None = None) -> None:
    """Run `worker(rank, *arguments)` once per core (or `processes` times) and wait; an error in one ends all."""
    count = processes or (1 if device().type == "cuda" else os.cpu_count() or 1)
    if count == 1:
        if processes == 1 and device().type == "cpu":  # one core of several: the others are for somebody else
            torch.set_num_threads(1)
        worker(0, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        spawn(_enter, args=(worker, count, store, arguments), nprocs=count)  # type: ignore[no-untyped-call]


def _enter(rank: int, worker: Worker, count: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(minutes=30)
    )
    worker(rank, *arguments)
    distributed.barrier()
    # All work is on disk. A normal exit now and then aborts in the destructor of gloo's threads.
    sys.stdout.flush()
    os._exit(0)


def agree(value: float) -> float:
    """The first process's `value`, in all processes."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64)
    distributed.broadcast(box, 0)
    return float(box)


@torch.no_grad()
def average_gradients(*modules: nn.Module) -> None:
    """Replace the gradients of `modules` by their means over the processes."""
    if world_size() == 1:
        return
    gradients = [value.grad for module in modules for value in module.parameters() if value.grad is not None]
    for gradient, total in zip(gradients, _sums(gradients), strict=True):
        gradient.copy_(total / world_size())


def divided(work: Callable[[Sequence[Tensor]], list[Tensor]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`work` of the tensors, whose shapes it keeps, each done by one of the processes and known to all of them."""
    count = world_size()
    if count == 1:
        return work(tensors)
    rank = distributed.get_rank()
    found = [torch.zeros_like(one) for one in tensors]
    found[rank::count] = work(tensors[rank::count])
    return _sums(found)


def _sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the processes, sent in one piece."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
