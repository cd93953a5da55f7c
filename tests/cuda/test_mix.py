"""The mask and the mixed weight, bit for bit the reference's, in memory and inside the products."""

from __future__ import annotations

import math

import pytest
import torch

from mixout_kernels import reference
from mixout_kernels.backends import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw, strides_of

from .. import axes
from ..memory import poison_dropped
from ..placements import PLACEMENTS, draw_at

LAYOUTS = [False, True]
SEED = -(2**62) + 12345
TYPES = {  # weight, target, compute
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp32, bf16 target, fp32": (torch.float32, torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp32 to bf16": (torch.float32, torch.float32, torch.bfloat16),
    "fp32, bf16 target": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32 to fp16": (torch.float32, torch.float32, torch.float16),
}


@pytest.fixture(params=PLACEMENTS)
def matrix_draw(request, device):
    def draw(shape, p):
        return draw_at(request.param, shape, p, SEED, device)

    return draw


def seed_tensor(device, seed=SEED):
    return torch.tensor([seed], device=device)


def random(shape, dtype, device, *, transposed=False):
    return axes.normal(shape, dtype, device, "transposed" if transposed else "contiguous")


def expected_phi(w, u, draw, factor, dtype):
    """The formula in float32: the weight may be rounded to the compute dtype only once."""
    w, u = w.float(), torch.zeros_like(w).float() if u is None else u.float()
    return torch.where(reference.decisions(draw, w.shape), u + (w - u) * factor, u).to(dtype)


def bits(t):
    return t.contiguous().view(torch.int16 if t.dtype.itemsize == 2 else torch.int32)


def assert_same_bits(result, expected):
    assert result.dtype == expected.dtype
    assert torch.equal(bits(result), bits(expected))


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0**-32, 0.5, 0.9, 1 - 2.0**-33, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (3, 1025)], ids=str)
def test_keep_mask(kernels, matrix_draw, device, shape, p):
    for seed in (0, 1, SEED, 2**63 - 1, -1):
        draw = matrix_draw(shape, p)._replace(seed=seed_tensor(device, seed))
        keep = kernels.keep_mask(draw, shape)
        assert torch.equal(keep, reference.decisions(draw, shape).expand(shape))


def other_draw(kind, shape, device, p):
    """Of a weight of any dimension; ``axis`` 0, too, where the kind has one."""
    for axis in {0, min(1, len(shape) - 1)}:
        yield Draw(seed_tensor(device), p, strides_of(kind, shape, axis), offset=axis * 6)


@pytest.mark.parametrize("kind", axes.MASKS)
@pytest.mark.parametrize("shape", [(1,), (1000,), (4, 63, 3), (3, 5, 2, 7)], ids=str)
def test_keep_mask_of_any_dimension(kernels, device, kind, shape):
    for draw in other_draw(kind, shape, device, 0.5):
        assert torch.equal(kernels.keep_mask(draw, shape), reference.decisions(draw, shape).expand(shape))


@axes.gpu_dtypes
@pytest.mark.parametrize("kind", axes.MASKS)
@pytest.mark.parametrize("shape", [(1,), (1000,), (63, 100), (130, 256), (4, 63, 3), (3, 5, 2, 7)], ids=str)
@pytest.mark.parametrize("target", [True, False], ids=["target", "zero"])
def test_mixout(kernels, device, dtype, kind, shape, target):
    w, u = random(shape, dtype, device), random(shape, dtype, device) if target else None
    for draw in other_draw(kind, shape, device, 0.6):
        for factor in (draw.scale, 3.0):
            assert_same_bits(kernels.mixout(w, u, draw, factor), expected_phi(w, u, draw, factor, dtype))


def test_an_address_off_16_bytes(kernels, matrix_draw, device):
    w = torch.randn(40 * 64 + 1, device=device)[1:].view(40, 64)
    draw = matrix_draw(w.shape, 0.5)
    assert_same_bits(kernels.mixout(w, None, draw, 2.0), expected_phi(w, None, draw, 2.0, w.dtype))


@pytest.mark.parametrize("layouts", [(a, b, c) for a in LAYOUTS for b in LAYOUTS for c in LAYOUTS], ids=str)
def test_mix_into(kernels, matrix_draw, device, layouts):
    """The result's layout is the one that counts."""
    shape = 63, 104
    out, w, u = (random(shape, torch.float32, device, transposed=transposed) for transposed in layouts)
    draw = matrix_draw(shape, 0.6)
    expected = expected_phi(w, u, draw, 3.0, w.dtype)
    assert kernels.primitives.mix_into(out, w, u, draw, 3.0) is out
    assert_same_bits(out, expected)
    kernels.primitives.mix_into(w, w, u, draw, 3.0)
    assert_same_bits(w, expected)


def test_mix_into_a_matrix_with_gaps(kernels, device):
    w = torch.randn(8, 32, device=device)
    draw = Draw(seed_tensor(device), 0.5, (0, 1))
    assert_same_bits(
        kernels.primitives.mix_into(torch.empty(8, 16, device=device), w[:, ::2], None, draw, 2.0),
        expected_phi(w[:, ::2], None, draw, 2.0, w.dtype),
    )
    with pytest.raises(ValueError, match=r"writes matrices without gaps, got \[8, 16\] with \(32, 2\)"):
        kernels.primitives.mix_into(w[:, ::2], w[:, ::2], None, draw, 2.0)


def test_mixout_list(kernels, device, monkeypatch):
    """Odd shapes, layouts and addresses, with and without a target; each weight has a seed, a p and a mask of its own.

    There are two combinations of dtypes, hence two launches.
    """
    weights = [
        random((63, 100), torch.float32, device),
        random((100, 63), torch.bfloat16, device, transposed=True),
        torch.randn(33 * 17 + 3, device=device)[3:].view(33, 17),
        random((1, 1), torch.float32, device),
        random((40, 520), torch.float32, device, transposed=True),
        random((130, 72), torch.bfloat16, device),
        random((17, 200), torch.bfloat16, device),
        *(random((63, 72), torch.float32, device, transposed=transposed) for transposed in LAYOUTS * len(PLACEMENTS)),
    ]
    targets = [random(w.shape, w.dtype, device, transposed=not w.is_contiguous()) for w in weights]
    targets[6] = None
    targets[3] = None
    seeds = torch.arange(len(weights), device=device) * 2**40 - 7
    masks = list(PLACEMENTS.values())
    draws = [
        Draw(seeds[k : k + 1], 0.5 + 0.49 * k / len(weights), *masks[k // 2 % len(masks)](*w.shape))
        for k, w in enumerate(weights)
    ]
    outs = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    launches, mix = [], kernels.primitives._loaded.mix
    monkeypatch.setattr(kernels.primitives._loaded, "mix", lambda table, *types: launches.append(mix(table, *types)))
    kernels.mixout_list(outs, weights, targets, draws)
    assert len(launches) == 2
    for w, u, draw, phi in zip(weights, targets, draws, outs, strict=True):
        assert phi.stride() == w.stride()
        assert_same_bits(phi, expected_phi(w, u, draw, draw.scale, torch.bfloat16))


def test_mixout_list_of_more_weights_than_a_table_holds(kernels, device):
    weights = list(torch.randn(1100, 3, 5, device=device))
    seeds = torch.arange(1100, device=device)
    draws = [Draw(seeds[k : k + 1], 0.5 + k / 4000, (5, 1)) for k in range(1100)]
    outs = [torch.empty_like(w) for w in weights]
    kernels.mixout_list(outs, weights, [None] * 1100, draws)
    for w, draw, phi in zip(weights, draws, outs, strict=True):
        assert_same_bits(phi, expected_phi(w, None, draw, draw.scale, torch.float32))


# --- inside the products ----------------------------------------------------------------------------------------------


def linear(kernels, x, phi, schedule):
    return kernels.mix_linear(x, phi, None, WeightGradient(phi.draw, 1.0, 0), schedule)[0]


def backward(kernels, g, saved, phi, gradient, schedule, *, dx=False, dw=False):
    return kernels.mix_linear_backward(g, saved, phi, gradient, (dx, dw, False), schedule)


@axes.transposed
def test_an_operand_that_is_there_already(kernels, device, transposed):
    """It is used as it is: w itself holds NaN here."""
    w = torch.full((24, 40), math.nan, device=device)
    operand = random((24, 40), torch.float32, device, transposed=transposed)
    x, g = torch.randn(6, 40, device=device), torch.randn(6, 24, device=device)
    draw = Draw(seed_tensor(device), 0.5, (0, 1))
    phi, gradient = MixedWeight(w, w, operand, draw), WeightGradient(draw, 2.0, 40)
    y, saved = kernels.mix_linear(x, phi, None, gradient, "auto")
    assert torch.equal(y, x @ operand.t())
    dx, dw, _ = backward(kernels, g, saved, phi, gradient, "auto", dx=True, dw=True)
    assert torch.equal(dx, g @ operand)
    assert not dw.isnan().any()


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@axes.transposed
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (130, 72)], ids=str)
@axes.schedules
def test_operand_of_the_products(kernels, matrix_draw, device, types, transposed, shape, schedule):
    """With x, or g, the identity the product is Phi itself; dropped entries of w hold NaN and Inf."""
    weight, target, compute = types
    w, u = random(shape, weight, device, transposed=transposed), random(shape, target, device, transposed=transposed)
    draw = matrix_draw(shape, 0.6)
    poison_dropped(w, draw)
    phi = MixedWeight(w, u, None, draw)
    expected = expected_phi(w, u, draw, draw.scale, compute)
    if not expected.isfinite().all():
        pytest.fail("the expected operand is not finite: the test would compare nothing")

    y = linear(kernels, torch.eye(shape[1], dtype=compute, device=device), phi, schedule)
    assert_same_bits(y.t(), expected)
    g = torch.eye(shape[0], dtype=compute, device=device)
    dx, _, _ = backward(kernels, g, g[:0], phi, WeightGradient(draw, 1.0, 0), schedule, dx=True)
    assert_same_bits(dx, expected)


@pytest.mark.parametrize("types", [TYPES["fp32"], TYPES["bf16"], TYPES["fp32 to bf16"]], ids=str)
@axes.transposed
def test_gradient_mask(kernels, matrix_draw, device, types, transposed):
    """dw of g = identity is x where the second threshold keeps it, scaled and rounded once, and exactly zero elsewhere.

    The mix has a threshold below it, or p = 0 with w itself as the operand.
    """
    weight, _, compute = types
    shape, q, scale = (24, 104), 0.7, 3.0
    w = random(shape, weight, device, transposed=transposed)
    x = random(shape, compute, device)
    g = torch.eye(shape[0], dtype=compute, device=device)
    for p, operand in ((0.4, None), (0.0, w.to(compute))):
        draw = matrix_draw(shape, p)
        phi, gradient = MixedWeight(w, None, operand, draw), WeightGradient(draw.at(q), scale, None)
        if draw.by_column:
            _, saved = kernels.mix_linear(x, phi, None, gradient, "auto")
            assert saved.shape[1] == int(reference.decisions(draw.at(q), shape).sum())
        else:
            saved = x
        _, dw, _ = backward(kernels, g, saved, phi, gradient, "auto", dw=True)
        keep = reference.decisions(draw.at(q), shape).expand(shape)
        assert_same_bits(dw, torch.where(keep, scale * x.float(), 0.0).to(weight))
        assert dw.stride() == w.stride()
