"""Kept columns: gathered at a fixed capacity, spread over dw again, and safe when a draw does not fit."""

from __future__ import annotations

import pytest
import torch

from mixout_kernels import reference
from mixout_kernels.backends import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw, column_capacity

from .. import axes

OFFSETS = [0, 2**33 + 3]  # of a shard of the input features


def column_draw(device, p, offset=0):
    return Draw(torch.tensor([77], device=device), p, (0, 1), offset)


def kept_columns(draw, features):
    return reference.decisions(draw, (1, features)).flatten().nonzero().flatten()


@axes.gpu_dtypes
@pytest.mark.parametrize("features", [1, 63, 256, 1030])
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("p", [1e-9, 0.7, 1 - 2.0**-33])
@pytest.mark.parametrize("offset", OFFSETS)
def test_gather(kernels, device, dtype, features, rows, p, offset):
    """Capacities: what is reserved, one column, and half of what is kept: an overflow, which must not be written."""
    x = torch.randn(rows, features, device=device).to(dtype)
    draw = column_draw(device, p, offset)
    kept = kept_columns(draw, features)
    for capacity in {column_capacity(features, p), 1, len(kept) // 2, len(kept) + 3}:
        compact = kernels.primitives.gather_columns(x, draw, capacity)
        expected = torch.zeros(rows, capacity, dtype=dtype, device=device)
        fit = kept[:capacity]
        expected[:, : len(fit)] = x[:, fit]
        assert torch.equal(compact, expected)


def test_gather_of_rows_with_gaps(kernels, device):
    x, draw = torch.randn(8, 200, device=device)[:, :100], column_draw(device, 0.7)
    kept = kept_columns(draw, 100)
    assert torch.equal(kernels.primitives.gather_columns(x, draw, len(kept)), x[:, kept])


@pytest.mark.parametrize(
    "types", [(d, d) for d in axes.GPU_DTYPES] + [(d, torch.float32) for d in axes.GPU_DTYPES[1:]], ids=str
)
@axes.transposed
@pytest.mark.parametrize("features", [1, 63, 1028, 1030])  # of these and the rows one each is whole vectors
@pytest.mark.parametrize("rows", [70, 516])
@pytest.mark.parametrize("overflow", [False, True], ids=["", "overflow"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_scatter(kernels, device, types, transposed, features, rows, overflow, offset):
    """Exact in the kept columns, zero in the other ones."""
    compute, weight = types
    scale, draw = 4.0, column_draw(device, 0.6, offset)
    kept = kept_columns(draw, features)
    fit = kept[: len(kept) // 2] if overflow else kept
    capacity = len(fit) if overflow else column_capacity(features, draw.p)
    compact = torch.randn(rows, capacity, device=device).to(compute)
    out = torch.empty((features, rows) if transposed else (rows, features), dtype=weight, device=device)
    out = out.t() if transposed else out
    assert kernels.primitives.scatter_columns(compact, out, draw, scale) is out
    expected = torch.zeros(rows, features, dtype=weight, device=device)
    expected[:, fit] = (scale * compact[:, : len(fit)].float()).to(weight)
    assert torch.equal(out, expected)


@axes.gpu_dtypes
@axes.transposed
@pytest.mark.parametrize("outputs", [1, 24, 40, 100])
@pytest.mark.parametrize("rows", [1, 130, 1100])
@pytest.mark.parametrize("gaps", [0, 3, 16])
def test_scatter_with_the_sums_of_g(kernels, device, dtype, transposed, outputs, rows, gaps):
    """dw is that of ``scatter_columns``, and db the sum over the rows of g in float32, rounded once."""
    draw = column_draw(device, 0.6)
    compact = torch.randn(outputs, 40, device=device).to(dtype)
    g = torch.randn(rows, outputs + gaps, device=device).to(dtype)[:, :outputs]
    dw, alone = (torch.empty((63, outputs) if transposed else (outputs, 63), device=device) for _ in range(2))
    dw, alone = (dw.t(), alone.t()) if transposed else (dw, alone)
    db = kernels.primitives.scatter_columns_and_sum(compact, dw, draw, 4.0, g)
    assert torch.equal(dw, kernels.primitives.scatter_columns(compact, alone, draw, 4.0))
    truth, terms = g.double().sum(0), g.double().abs().sum(0)
    rounding = (torch.finfo(dtype).eps * truth.abs() + rows**0.5 * torch.finfo(torch.float32).eps * terms) / 2
    assert db.dtype == dtype
    assert ((db.double() - truth).abs() <= rounding).all()


def test_sums_without_input_features(kernels, device):
    g = torch.randn(70, 24, device=device)
    compact, dw = torch.empty(24, 0, device=device), torch.empty(24, 0, device=device)
    db = kernels.primitives.scatter_columns_and_sum(compact, dw, column_draw(device, 0.6), 4.0, g)
    torch.testing.assert_close(db, g.sum(0))


@axes.schedules
def test_what_is_saved(kernels, device, schedule):
    """None is exactly the kept columns, of the gradient's threshold; 0 is nothing."""
    x, w = torch.randn(8, 100, device=device), torch.randn(24, 100, device=device)
    draw = column_draw(device, 0.3)
    for width in (None, 0):
        gradient = WeightGradient(draw.at(0.7), 1.0, width)
        _, saved = kernels.mix_linear(x, MixedWeight(w, None, None, draw), None, gradient, schedule)
        assert torch.equal(saved, x[:, :0] if width == 0 else x[:, kept_columns(draw.at(0.7), 100)])
