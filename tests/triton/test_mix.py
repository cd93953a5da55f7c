"""Phi in the interpreter, bit for bit the reference's: in every layout, of one weight and of lists of them."""

import itertools

import pytest
import torch

from mixout_kernels import reference
from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import mix
from mixout_kernels.backends.triton import mix_list as mix_list_module
from mixout_kernels.draws import Draw, GradientMask, strides_of

from .. import axes
from ..memory import poison_dropped
from ..placements import PLACEMENTS, SHAPES, draw_at
from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]


def expected_phi(w, u, draw, dtype):
    return reference.mixed_weight(w, u, None, draw, GradientMask.of(draw.p), dtype)


def assert_phi(phi, w, u, draw):
    assert phi.dtype == w.dtype
    assert torch.equal(phi, expected_phi(w, u, draw, w.dtype))
    assert not phi.isnan().any()


@axes.gpu_dtypes
@pytest.mark.parametrize("kind", axes.MASKS)
@pytest.mark.parametrize(
    "shape", [(1,), (130,), (1, 1), (63, 100), (100, 63), (5, 1030), (4, 63, 3), (3, 5, 2, 7)], ids=str
)
def test_mixout(dtype, kind, shape):
    for p in (1e-9, 0.5, 0.9):
        draw = Draw(torch.tensor([31]), p, strides_of(kind, shape))
        for target in (True, False):
            w = poison_dropped(axes.normal(shape, dtype), draw)
            u = axes.normal(shape, dtype) if target else None
            phi = backend.mixout(w, u, draw, draw.scale)
            assert phi.is_contiguous()
            assert_phi(phi, w, u, draw)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_of_the_input_features(axis):
    shape = (6, 10, 12)
    draw = Draw(torch.tensor([31]), 0.5, strides_of("neuron", shape, axis))
    w, u = poison_dropped(axes.normal(shape), draw), axes.normal(shape)
    assert_phi(backend.mixout(w, u, draw, draw.scale), w, u, draw)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 63), (63, 1)], ids=str)
def test_placements_in_every_layout(placement, layout, shape):
    draw = draw_at(placement, shape)
    for target in ("contiguous", "transposed"):
        w, u = (
            poison_dropped(axes.normal(shape, layout=layout), draw),
            axes.normal(shape, torch.bfloat16, layout=target),
        )
        assert_phi(backend.mixout(w, u, draw, draw.scale), w, u, draw)


def test_into_the_weight_itself():
    draw = draw_at("weight", (63, 100))
    w = axes.normal((63, 100))
    expected = expected_phi(w, None, draw, w.dtype)
    assert mix.mix_into(w, w, None, draw, draw.scale) is w
    assert torch.equal(w, expected)


def test_factor_is_the_callers():
    draw, w = draw_at("neuron", (63, 100)), axes.normal((63, 100))
    assert torch.equal(
        backend.mixout(w, None, draw, 0.25), torch.where(reference.decisions(draw, w.shape), w * 0.25, 0.0)
    )


# --- lists ------------------------------------------------------------------------------------------------------------


def assert_list(weights, targets, draws, dtype):
    outs = [torch.empty_like(w, dtype=dtype) for w in weights]
    backend.mixout_list(outs, weights, targets, draws)
    for w, u, draw, phi in zip(weights, targets, draws, outs, strict=True):
        assert torch.equal(phi, expected_phi(w, u, draw, dtype))


@pytest.mark.parametrize("kind", axes.MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "mixed"])
@axes.wide_and_narrow
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, None], ids=str)
def test_list(kind, layout, dtype, target):
    """Weights of one layout, or of three with targets of another; a p for each, and seeds anywhere in memory."""
    shapes = [(3, 5), (64, 48), (100, 63), (16, 512), (1, 1), (33, 300), (1, 40)]
    seeds = [*torch.tensor([3, -1, 2**40, 5, 3]), torch.tensor(9), torch.tensor([-(2**63)])]
    rates = [0.4, 0.9, 1e-9, 0.5, 0.4, 0.7, 1 - 2**-33]
    weights, targets, draws = [], [], []
    for k, (shape, seed, p) in enumerate(zip(shapes, seeds, rates, strict=True)):
        how = ("contiguous", "transposed", "strided")[k % 3] if layout == "mixed" else layout
        draws.append(Draw(seed, p, strides_of(kind, shape)))
        weights.append(poison_dropped(axes.normal(shape, layout=how), draws[-1]))
        targets.append(
            None if target is None else axes.normal(shape, target, layout="contiguous" if layout == "mixed" else how)
        )
    assert_list(weights, targets, draws, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_list_of_every_placement(layout):
    weights, targets, draws = [], [], []
    for k, (placement, shape) in enumerate(itertools.product(PLACEMENTS, SHAPES)):
        draws.append(draw_at(placement, shape, p=0.3 + 0.02 * k, seed=k))
        weights.append(poison_dropped(axes.normal(shape, layout=layout), draws[-1]))
        targets.append(axes.normal(shape, layout=layout))
    assert_list(weights, targets, draws, torch.float32)


def test_list_of_weights_at_odd_addresses():
    """Addresses and widths that no 16-byte load may assume anything of."""
    memory = torch.randn(2, 4000)
    weights = [memory[0][1:1001].view(20, 50), memory[0][1003:2003].view(25, 40)]
    targets = [memory[1][3:1003].view(20, 50), memory[1][1005:2005].view(25, 40)]
    assert_list(weights, targets, [draw_at("weight", w.shape, seed=k) for k, w in enumerate(weights)], torch.float32)


@pytest.fixture
def launches(monkeypatch):
    """The kernels that ``mixout_list`` would launch."""
    launched = []
    monkeypatch.setattr(mix_list_module, "launch", lambda kernel, *arguments, **options: launched.append(kernel))
    return launched


@pytest.mark.parametrize("kind", axes.MASKS)
@pytest.mark.parametrize("column_major", [False, True])
def test_one_launch_for_weights_that_differ_in_p_and_shape(launches, kind, column_major):
    weights = [torch.zeros(16, 4 * n).t() if column_major else torch.zeros(4 * n, 16) for n in range(1, 40)]
    weights.append(torch.zeros(1, 16))
    draws = [Draw(torch.tensor(k), 0.01 + k / 50, strides_of(kind, w.shape)) for k, w in enumerate(weights)]
    backend.mixout_list(weights, weights, weights, draws)
    assert len(launches) == (2 if column_major else 1)  # the last weight is row-major


def test_one_launch_for_each_structure_of_mask(launches):
    shape = (64, 48)
    draws = [draw_at(kind, shape) for kind in ("neuron", "weight", "output") * 2]
    weights = [torch.zeros(shape) for _ in draws]
    backend.mixout_list(weights, weights, weights, draws)
    assert len(launches) == 3
