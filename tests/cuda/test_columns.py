"""Kept columns: gathered at a fixed capacity, spread over dw again, and safe when a draw does not fit."""

from __future__ import annotations

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 77


def kept_columns(p, features):
    return mk.reference.keep_mask(SEED, p=p, shape=(1, features)).nonzero().flatten()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 63, 256, 1030])
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("p", [1e-9, 0.7, 1.0])
def test_gather(kernels, device, dtype, features, rows, p):
    """Capacities: what ops reserves, one column, and half of what is kept: an overflow, which must not be written."""
    x = torch.randn(rows, features, device=device).to(dtype)
    kept = kept_columns(p, features)
    for capacity in {ops.column_capacity(features, p), 1, len(kept) // 2, len(kept) + 3}:
        compact = kernels._gather_kept(x, torch.tensor([SEED], device=device), p, capacity)
        expected = torch.zeros(rows, capacity, dtype=dtype, device=device)
        fit = kept[:capacity].to(device)
        expected[:, : len(fit)] = x[:, fit]
        assert torch.equal(compact, expected)


@pytest.mark.parametrize("types", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])
@pytest.mark.parametrize("features", [1, 63, 1030])
@pytest.mark.parametrize("overflow", [False, True], ids=["", "overflow"])
def test_scatter(kernels, device, types, transposed, features, overflow):
    """dw of g = identity is x[:, kept] transposed back into its columns: exact, zero in the other columns."""
    compute, weight = types
    p, scale, rows = 0.6, 4.0, 70
    kept = kept_columns(p, features)
    fit = kept[: len(kept) // 2] if overflow else kept
    capacity = len(fit) if overflow else ops.column_capacity(features, p)
    x = torch.randn(rows, features, device=device).to(compute)
    w = torch.zeros((features, rows) if transposed else (rows, features), dtype=weight, device=device)
    w = w.t() if transposed else w
    seed = torch.tensor([SEED], device=device)
    saved = kernels._gather_kept(x, seed, p, capacity)
    eye = torch.eye(rows, dtype=compute, device=device)
    dw = kernels._weight_gradient(eye, saved, w, seed, p, scale, "neuron")
    expected = torch.zeros(rows, features, dtype=weight, device=device)
    expected[:, fit.to(device)] = (scale * x[:, fit.to(device)].float()).to(weight)
    assert torch.equal(dw, expected)
    assert dw.stride() == w.stride() or w.numel() <= rows


@pytest.mark.parametrize("needs_weight", [False, True])
def test_what_is_saved(kernels, device, needs_weight):
    """None is exactly the kept columns; 0 is nothing."""
    x, w = torch.randn(8, 100, device=device), torch.randn(24, 100, device=device)
    _, saved = kernels.mix_linear(
        x, w, None, None, torch.tensor([SEED], device=device), 0.7, "neuron", None if needs_weight else 0, "auto"
    )
    kept = kept_columns(0.7, 100).to(device)
    assert torch.equal(saved, x[:, kept] if needs_weight else x[:, :0])
