"""The kept columns gathered at a fixed width and scattered back, in the interpreter: exact, and never out of bounds."""

import pytest
import torch

from mixout_kernels import reference
from mixout_kernels.backends.triton import columns
from mixout_kernels.draws import Draw

from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]
SHAPES = [(1, 1), (63, 100), (7, 300), (130, 63)]


def matrix(rows, width, transposed, dtype=torch.float32):
    return torch.randn(width, rows).to(dtype).t() if transposed else torch.randn(rows, width).to(dtype)


def draw_from(offset):
    return Draw(torch.tensor([-5]), 0.7, (0, 1), offset)


def kept_columns(draw, width):
    return reference.decisions(draw, (1, width))[0].nonzero()[:, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("spare", [-10_000, -3, 0, 300])
@pytest.mark.parametrize("offset", [0, 5, 2**34 - 8])
def test_gather(shape, transposed, spare, offset):
    """``spare``: how many columns more than are kept; a negative number forces an overflow."""
    draw = draw_from(offset)
    x, kept = matrix(*shape, transposed), kept_columns(draw, shape[1])
    width = max(0, len(kept) + spare)
    expected = torch.zeros(shape[0], width)
    expected[:, : len(kept)] = x[:, kept[:width]]
    assert torch.equal(columns.gather_columns(x, draw, width), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("spare", [-10_000, -3, 0, 300])
@pytest.mark.parametrize("offset", [0, 5])
def test_scatter(shape, transposed, spare, offset):
    draw = draw_from(offset)
    kept = kept_columns(draw, shape[1])
    width = max(0, len(kept) + spare)
    compact = matrix(shape[0], width, transposed)
    compact[:, len(kept) :] = torch.nan  # unused columns must not be read into the result
    out = torch.empty_like(matrix(*shape, transposed))
    expected = torch.zeros(shape)
    expected[:, kept[:width]] = compact[:, : len(kept)]
    assert torch.equal(columns.scatter_columns(compact, out, draw, 0.5), expected * 0.5)


def test_a_dropped_nan_is_not_gathered():
    draw, x = draw_from(0), matrix(63, 100, False)
    dropped = torch.ones(100, dtype=torch.bool).index_fill_(0, kept_columns(draw, 100), False)
    x[:, dropped] = torch.nan
    assert columns.gather_columns(x, draw, 48).isfinite().all()
