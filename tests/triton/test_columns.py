"""The kept columns gathered at a fixed width and scattered back, in the interpreter: exact, and never out of bounds."""

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels.backends.triton import columns

from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]
SEED, P = torch.tensor([-5]), 0.7
SHAPES = [(1, 1), (63, 100), (7, 300), (130, 63)]


def matrix(rows, width, transposed, dtype=torch.float32):
    return torch.randn(width, rows).to(dtype).t() if transposed else torch.randn(rows, width).to(dtype)


def kept_columns(width):
    return mk.reference.keep_mask(SEED, p=P, shape=(1, width)).nonzero()[:, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("spare", [-10_000, -3, 0, 300])
def test_gather(shape, transposed, spare):
    """``spare``: how many columns more than are kept; a negative number forces an overflow."""
    x, kept = matrix(*shape, transposed), kept_columns(shape[1])
    capacity = max(0, len(kept) + spare)
    expected = torch.zeros(shape[0], capacity)
    expected[:, : len(kept)] = x[:, kept[:capacity]]
    assert torch.equal(columns.gather_columns(x, SEED, P, capacity), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("spare", [-10_000, -3, 0, 300])
def test_scatter(shape, transposed, spare):
    kept = kept_columns(shape[1])
    capacity = max(0, len(kept) + spare)
    compact = matrix(shape[0], capacity, transposed)
    compact[:, len(kept) :] = torch.nan  # unused columns must not be read into the result
    out = torch.empty_like(matrix(*shape, transposed))
    expected = torch.zeros(shape)
    expected[:, kept[:capacity]] = compact[:, : len(kept)]
    assert torch.equal(columns.scatter_columns(compact, out, SEED, P, 0.5), expected * 0.5)


def test_a_dropped_nan_is_not_gathered():
    x = matrix(63, 100, False)
    dropped = torch.ones(100, dtype=torch.bool).index_fill_(0, kept_columns(100), False)
    x[:, dropped] = torch.nan
    assert columns.gather_columns(x, SEED, P, 48).isfinite().all()
