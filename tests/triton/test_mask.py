"""Masks in the interpreter, bit for bit those of the reference."""

import pytest
import torch
import triton
import triton.language as tl

from mixout_kernels import reference
from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import mask as masks

from .conftest import needs_interpreter

pytestmark = needs_interpreter
SEEDS = [0, 5, -1, 2**62 + 12345, -(2**63)]
PROBABILITIES = [1e-300, 2**-32, 0.3, 0.5, 0.9, 1 - 2**-33, 1.0]


@pytest.mark.parametrize("mask", ["neuron", "weight"])
@pytest.mark.parametrize("shape", [(1,), (9,), (1, 1), (3, 5), (7, 1030), (64, 64), (3, 5, 7), (0, 4)], ids=str)
def test_keep_mask(mask, shape):
    for seed, p in [*((seed, 0.3) for seed in SEEDS), *((5, p) for p in PROBABILITIES)]:
        expected = reference.keep_mask(seed, p=p, shape=shape, mask=mask)
        assert torch.equal(backend.keep_mask(torch.tensor([seed]), p, shape, mask), expected)


@triton.jit
def _keep_functions_kernel(line_ptr, rows_ptr, each_ptr, seed_ptr, threshold, first, stride, WIDTH: tl.constexpr):
    seed = tl.load(seed_ptr)
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, 4)
    tl.store(line_ptr + column, masks.keep_line(seed, threshold, first, WIDTH))
    tile = row[:, None] * WIDTH + column[None, :]
    row_first = first + row.to(tl.int64) * stride
    tl.store(rows_ptr + tile, masks.keep_rows(seed, threshold, row_first, 4, WIDTH))
    tl.store(each_ptr + tile, masks.keep_each(seed, threshold, (row_first + 1)[:, None] + column[None, :]))


@pytest.mark.parametrize("first", [0, 2**31, 2**34 - 64, 2**34, 2**40 + 4])
def test_indices_beyond_32_bits(first):
    """2^34 is where the counter, index // 4, passes 32 bits."""
    stride, seed, p = 2**33 + 4, torch.tensor([-7]), 0.5
    line = torch.zeros(128, dtype=torch.bool)
    rows, each = torch.zeros(2, 4, 128, dtype=torch.bool)
    _keep_functions_kernel[(1,)](line, rows, each, seed, masks.threshold_argument(p), first, stride, WIDTH=128)
    index = first + torch.arange(4)[:, None] * stride + torch.arange(128)
    expected = reference.keep_words(seed, index) >= 2**31
    assert torch.equal(rows, expected)
    assert torch.equal(line, expected[0])
    assert torch.equal(each, reference.keep_words(seed, index + 1) >= 2**31)


@triton.jit
def _count_kernel(count_ptr, seed_ptr, threshold, end):
    tl.store(count_ptr, masks.count_kept(tl.load(seed_ptr), threshold, end))


@pytest.mark.parametrize("end", [0, 4, 1020, 1024, 1028, 4100])
def test_count_kept(end):
    seed, count = torch.tensor([11]), torch.full((1,), -1, dtype=torch.int32)
    _count_kernel[(1,)](count, seed, masks.threshold_argument(0.7), end)
    assert count.item() == reference.keep_mask(seed, p=0.7, shape=(end,)).sum().item()
