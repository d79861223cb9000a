"""Two processes that learn side by side have the same weights, and do each matrix once."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from training import parallel
from training.muon import Muon

pytestmark = pytest.mark.slow


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3))


def one_step(model, inputs):
    optimizer = Muon(model, lr=1e-2, weight_decay=0.0)
    with torch.enable_grad():
        model(inputs).square().mean().backward()
    parallel.average_gradients(model)
    optimizer.step()
    return model


def inputs_of(rank):
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))


def worker(rank, folder):
    torch.save(one_step(layers(), inputs_of(rank)).state_dict(), folder / f"{rank}.pt")
    done = parallel.divided(lambda tensors: [each + os.getpid() for each in tensors], [torch.zeros(2), torch.zeros(3)])
    torch.save(done, folder / f"divided-{rank}.pt")


def test_two_processes_take_the_step_of_one_with_both_halves(tmp_path: Path) -> None:
    parallel.launch(worker, tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = one_step(layers(), torch.cat([inputs_of(0), inputs_of(1)])).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(first[name], alone[name], atol=1e-5) for name in first)
    halves, same = (torch.load(tmp_path / f"divided-{rank}.pt") for rank in (0, 1))
    assert [half.tolist() for half in halves] == [half.tolist() for half in same]
    assert halves[0][0] != halves[1][0], "one process did both"


def test_one_process_divides_with_nobody() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    done = parallel.divided(lambda tensors: [each * 2 for each in tensors], copy.deepcopy(tensors))
    assert [one.tolist() for one in done] == [[2.0, 2.0], [2.0, 2.0, 2.0]]
