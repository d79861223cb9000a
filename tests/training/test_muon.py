"""The optimizer: what it makes of matrices, what it leaves to AdamW, and that it goes on after a kill."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training import muon
from training.muon import ADAM_BETAS, Muon, orthogonalised

SHAPES = [(16, 40), (40, 16), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_count_alike_and_stay_what_they_are(shape, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalised(matrix[None])[0] @ v.T
    assert values.max() > 1.5 * values.min()
    assert (found - torch.diag(found.diagonal())).abs().max() < 0.01
    assert 0.6 < found.diagonal().min() <= found.diagonal().max() < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_bfloat16_differs_by_its_rounding_only(shape, monkeypatch):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: False)
    exact = orthogonalised(matrices)
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: True)
    rounded = orthogonalised(matrices)
    assert rounded.dtype == matrices.dtype
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 3))


def teach(model, optimizer, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        words = torch.randint(20, (8,), generator=generator)
        loss = (model(words) - torch.nn.functional.one_hot(words % 3, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.enable_grad()
def test_embeddings_norms_and_what_has_few_rows_are_adams():
    model = network()
    twin = copy.deepcopy(model)
    optimizer = Muon(model, lr=1e-2, weight_decay=0.1)
    (only,) = optimizer.param_groups[0]["params"]
    assert only is model[1].weight
    adam = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=ADAM_BETAS, weight_decay=0.1)
    teach(model, optimizer, 1)
    teach(twin, adam, 1)
    for (name, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        same = torch.allclose(value, other, atol=1e-6)
        assert same is (name != "1.weight"), name


@torch.enable_grad()
def test_it_learns_and_goes_on_from_its_state():
    model = network()
    optimizer = Muon(model, lr=2e-2, weight_decay=0.0)
    first = teach(model, optimizer, 1)
    assert teach(model, optimizer, 60) < 0.1 * first
    twin = copy.deepcopy(model)
    other = Muon(twin, lr=2e-2, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert teach(model, optimizer, 3) == teach(twin, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
