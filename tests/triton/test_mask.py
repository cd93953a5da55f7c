"""Masks in the interpreter, bit for bit those of the reference."""

import pytest
import torch
import triton
import triton.language as tl

from mixout_kernels import reference
from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import mask as masks
from mixout_kernels.draws import Draw, strides_of

from .. import axes
from ..placements import PLACEMENTS, SHAPES, draw_at
from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]
SEEDS = [0, 5, -1, 2**62 + 12345, -(2**63)]
PROBABILITIES = [0.0, 1e-300, 2**-32, 0.3, 0.5, 0.9, 1 - 2**-33]


def assert_mask(draw, shape):
    assert torch.equal(backend.keep_mask(draw, shape), reference.decisions(draw, shape).expand(shape))


@pytest.mark.parametrize("kind", axes.MASKS)
@pytest.mark.parametrize(
    "shape", [(), (1,), (9,), (1, 1), (3, 5), (7, 1030), (64, 64), (3, 5, 7), (4, 6, 3, 3)], ids=str
)
def test_keep_mask(kind, shape):
    for seed, p in [*((seed, 0.3) for seed in SEEDS), *((5, p) for p in PROBABILITIES)]:
        assert_mask(Draw(torch.tensor([seed]), p, strides_of(kind, shape)), shape)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_placements(placement, shape):
    assert_mask(draw_at(placement, shape), shape)


def test_placements_take_every_path():
    """A line across or down, runs of four across or down, each entry by itself; aligned or not, where that matters."""
    taken = {masks.Placement.of(draw_at(name, shape)).pattern for name in PLACEMENTS for shape in SHAPES}
    for strides in ((0, 1), (1, 0), (-1, 1), (1, -1)):
        assert {(*strides, True), (*strides, False)} <= taken
    assert {(-1, -1, False), (0, 0, False)} <= taken


@triton.jit
def _count_kernel(count_ptr, seed_ptr, threshold, first, count, ALIGNED: tl.constexpr):
    seed, bound = tl.load(seed_ptr), masks.as_bound(threshold)
    tl.store(count_ptr, masks.count_kept(seed, bound, first, count, ALIGNED))


@pytest.mark.parametrize("first", [0, 8, 5, 2**31 - 4, 2**34 - 8])
@pytest.mark.parametrize("length", [0, 4, 1020, 1024, 1028, 4100])
def test_count_kept(first, length):
    draw, count = Draw(torch.tensor([11]), 0.7, (1,), first), torch.full((1,), -1, dtype=torch.int32)
    arguments = count, draw.seed, masks.threshold_argument(draw), first, length
    _count_kernel[(1,)](*arguments, ALIGNED=first % 4 == 0)
    assert count.item() == reference.decisions(draw, (length,)).sum().item()
