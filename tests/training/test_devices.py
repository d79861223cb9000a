"""The precision of a training step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training import devices


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def fast(request, monkeypatch):
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: request.param)
    return request.param


def test_products_are_in_bfloat16_only_where_that_is_faster(fast):
    a, b = torch.randn(2, 4, 4)
    with devices.mixed_precision():
        product = a @ b
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
    assert (a @ b).dtype == torch.float32


@torch.enable_grad()
def test_attention_and_its_gradient_stay_in_float32(fast):
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(1, 2, 5, 8)
    with devices.mixed_precision():
        q = x @ weight
        attended = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.5)
    assert q.dtype == (torch.bfloat16 if fast else torch.float32)
    assert attended.dtype == torch.float32
    wide = q.detach().float()
    assert torch.equal(attended, F.scaled_dot_product_attention(wide, wide, wide, is_causal=True, scale=0.5))
    attended.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()
