"""The mask and the mixed weight, bit for bit the reference's, in memory and inside the products."""

from __future__ import annotations

import math

import pytest
import torch

import mixout_kernels as mk

MASKS = ["neuron", "weight"]
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


def draw(shape, dtype, device, *, transposed=False):
    shape = shape[::-1] if transposed else shape
    drawn = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    return drawn.t() if transposed else drawn


def seed_tensor(device, seed=SEED):
    return torch.tensor([seed], device=device)


def keep_of(seed, p, shape, mask):
    return mk.reference.keep_mask(seed, p=p, shape=shape, mask=mask).expand(shape)


def expected_phi(w, u, p, mask, dtype, seed=SEED):
    """The reference's, of the mixing precision: the weight may be rounded to the compute dtype only once."""
    wide = None if u is None else u.float()
    return mk.reference.mixout(w.float(), wide, p=p, mask=mask, seed=seed).to(dtype)


def poison_dropped(w, p, mask):
    """NaN and Inf wherever the mask drops w: none of them may reach a result."""
    keep = keep_of(SEED, p, w.shape, mask).to(w.device)
    poison = torch.where(torch.arange(w.numel(), device=w.device).view(w.shape) % 2 == 0, math.nan, math.inf)
    w.copy_(torch.where(keep, w, poison.to(w.dtype)))


def bits(t):
    return t.contiguous().view(torch.int16 if t.dtype.itemsize == 2 else torch.int32)


def assert_same_bits(result, expected):
    assert result.dtype == expected.dtype
    assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("p", [2.0**-32, 0.5, 0.9, 1 - 2.0**-33, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (3, 1025), (1000,), (0, 5)], ids=str)
def test_keep_mask(kernels, device, mask, p, shape):
    for seed in (0, 1, SEED, 2**63 - 1, -1):
        keep = kernels.keep_mask(seed_tensor(device, seed), p, shape, mask)
        assert torch.equal(keep.cpu(), mk.reference.keep_mask(seed, p=p, shape=shape, mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1,), (1000,), (63, 100), (130, 256), (4, 63, 3), (3, 5, 2, 7), (0, 5)], ids=str)
@pytest.mark.parametrize("target", [True, False], ids=["target", "zero"])
def test_mixout(kernels, device, dtype, mask, shape, target):
    w, u = draw(shape, dtype, device), draw(shape, dtype, device) if target else None
    for p in (0.6, 1.0):
        phi = kernels.mixout(w, u, seed_tensor(device), p, 1 / (1 - p) if p < 1 else 1.0, mask)
        assert_same_bits(phi, mk.reference.mixout(w, u, p=p, mask=mask, seed=SEED))


@pytest.mark.parametrize("mask", MASKS)
def test_mixout_of_an_address_off_16_bytes(kernels, device, mask):
    memory = torch.randn(40 * 64 + 1, device=device)
    w = memory[1:].view(40, 64)
    phi = kernels.mixout(w, None, seed_tensor(device), 0.5, 2.0, mask)
    assert_same_bits(phi, mk.reference.mixout(w, None, p=0.5, mask=mask, seed=SEED))


@pytest.mark.parametrize("mask", MASKS)
def test_mixout_list(kernels, device, mask):
    """Odd shapes, layouts, addresses and dtypes, with and without a target, each weight with a seed of its own."""
    weights = [
        draw((63, 100), torch.float32, device),
        draw((100, 63), torch.bfloat16, device, transposed=True),
        torch.randn(33 * 17 + 3, device=device)[3:].view(33, 17),
        draw((1, 1), torch.float32, device),
        draw((40, 520), torch.float32, device, transposed=True),
        draw((130, 72), torch.bfloat16, device),
        draw((0, 8), torch.float32, device),
        draw((17, 200), torch.bfloat16, device),
    ]
    targets = [draw(w.shape, w.dtype, device, transposed=not w.is_contiguous()) for w in weights[:-1]] + [None]
    targets[0] = targets[0].bfloat16()
    seeds = torch.arange(len(weights), device=device) * 2**40 - 7
    outs = [torch.empty_like(w.t(), dtype=torch.bfloat16).t() if w.stride(0) == 1 else
            torch.empty_like(w, dtype=torch.bfloat16) for w in weights]  # fmt: skip
    kernels.mixout_list(outs, weights, targets, seeds, 0.7, mask)
    for k, (w, u, phi) in enumerate(zip(weights, targets, outs, strict=True)):
        assert_same_bits(phi, expected_phi(w, u, 0.7, mask, torch.bfloat16, int(seeds[k])))


def test_mixout_list_of_more_weights_than_a_table_holds(kernels, device):
    weights = list(torch.randn(1100, 3, 5, device=device))
    seeds = torch.arange(1100, device=device)
    outs = [torch.empty_like(w) for w in weights]
    kernels.mixout_list(outs, weights, [None] * 1100, seeds, 0.5, "weight")
    for k, phi in enumerate(outs):
        assert_same_bits(phi, expected_phi(weights[k], None, 0.5, "weight", torch.float32, k))


@pytest.mark.parametrize("transposed", LAYOUTS, ids=["[out, in]", "[in, out]"])
def test_a_weight_that_is_mixed_already(kernels, device, transposed):
    """It is used as it is: w itself holds NaN here."""
    w = torch.full((24, 40), math.nan, device=device)
    phi = draw((24, 40), torch.float32, device, transposed=transposed)
    x, g = torch.randn(6, 40, device=device), torch.randn(6, 24, device=device)
    y, saved = kernels.mix_linear(x, w, w, None, seed_tensor(device), 0.5, "neuron", 40, "auto", phi)
    assert torch.equal(y, x @ phi.t())
    dx, dw, _ = kernels.mix_linear_backward(
        g, saved, w, w, seed_tensor(device), 0.5, 2.0, "neuron", (True, True, False), "auto", phi
    )
    assert torch.equal(dx, g @ phi)
    assert not dw.isnan().any()


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("transposed", LAYOUTS, ids=["[out, in]", "[in, out]"])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (130, 72)], ids=str)
@pytest.mark.parametrize("schedule", ["fused", "staged"])
def test_operand_of_the_products(kernels, device, types, mask, transposed, shape, schedule):
    """With x, or g, the identity the product is Phi itself; dropped entries of w hold NaN and Inf."""
    weight, target, compute = types
    (out_features, in_features), p = shape, 0.6
    w, u = draw(shape, weight, device, transposed=transposed), draw(shape, target, device, transposed=transposed)
    poison_dropped(w, p, mask)
    expected = expected_phi(w, u, p, mask, compute)
    if not expected.isfinite().all():
        pytest.fail("the expected operand is not finite: the test would compare nothing")

    eye = torch.eye(in_features, dtype=compute, device=device)
    y, _ = kernels.mix_linear(eye, w, u, None, seed_tensor(device), p, mask, 0, schedule)
    assert_same_bits(y.t(), expected)

    eye = torch.eye(out_features, dtype=compute, device=device)
    needs = (True, False, False)
    dx, _, _ = kernels.mix_linear_backward(eye, eye[:0], w, u, seed_tensor(device), p, 1.0, mask, needs, schedule)
    assert_same_bits(dx, expected)
