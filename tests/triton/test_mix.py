"""Phi in the interpreter, bit for bit the reference's: in every layout, of one weight and of lists of them."""

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import mix_list as mix_list_module

from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]
MASKS = ["neuron", "weight"]
SEED = torch.tensor([31])


def draw(shape, dtype=torch.float32, layout="contiguous"):
    if layout == "transposed":
        return torch.randn(*reversed(shape)).to(dtype).t()
    if layout == "strided":
        return torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, ::2]
    return torch.randn(shape).to(dtype)


def poison_dropped(w, seed, p, mask):
    """Writes NaN and Inf into w where it is not kept."""
    keep = mk.reference.keep_mask(seed, p=p, shape=w.shape, mask=mask)
    if mask == "neuron" and w.dim() > 1:
        keep = keep.reshape(-1, *[1] * (w.dim() - 2))
    bad = torch.where(torch.arange(w.numel()).reshape(w.shape) % 2 == 0, torch.nan, torch.inf).to(w.dtype)
    return w.copy_(torch.where(keep, w, bad))


def assert_phi(phi, w, u, p, mask, seed=SEED):
    expected = mk.reference.mixout(w, u, p=p, mask=mask, seed=seed)
    assert phi.dtype == w.dtype
    assert torch.equal(phi, expected)
    assert not phi.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "shape", [(1,), (130,), (1, 1), (63, 100), (100, 63), (5, 1030), (4, 63, 3), (3, 5, 2, 7)], ids=str
)
def test_mixout(dtype, mask, shape):
    for p in (1e-9, 0.5, 0.9, 1.0):
        for target in (True, False):
            w = poison_dropped(draw(shape, dtype), SEED, p, mask)
            u = draw(shape, dtype) if target else None
            phi = backend.mixout(w, u, SEED, p, 1 / (1 - p) if p < 1 else 1.0, mask)
            assert phi.is_contiguous()
            assert_phi(phi, w, u, p, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("shape", [(1, 63), (63, 1), (130, 100), (70, 63)], ids=str)
def test_layouts(mask, layout, shape):
    w, u = draw(shape, layout=layout), draw(shape, torch.bfloat16, "transposed")
    poison_dropped(w, SEED, 0.5, mask)
    assert_phi(backend.mixout(w, u, SEED, 0.5, 2.0, mask), w, u, 0.5, mask)


@pytest.mark.parametrize("mask", MASKS)
def test_no_elements(mask):
    for shape in ((0,), (0, 5), (5, 0), (3, 0, 2)):
        w = torch.zeros(shape)
        assert backend.mixout(w, w, SEED, 0.5, 2.0, mask).shape == shape


def mix_list(weights, targets, seeds, p, mask, dtype):
    outs = [torch.empty_like(w, dtype=dtype) for w in weights]
    backend.mixout_list(outs, weights, targets, seeds, p, mask)
    for w, u, seed, phi in zip(weights, targets, seeds, outs, strict=True):
        assert torch.equal(phi, mk.reference.mixout(w, u, p=p, mask=mask, seed=seed).to(dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, None], ids=str)
def test_list(mask, layout, dtype, target):
    """Weights of one layout, or of three with targets of another."""
    shapes = [(3, 5), (64, 48), (100, 63), (0, 7), (16, 512), (1, 1), (33, 300)]
    seeds = torch.tensor([3, -1, 2**40, 5, 3, 9, -(2**63)])
    weights, targets = [], []
    for k, (shape, seed) in enumerate(zip(shapes, seeds, strict=True)):
        how = ("contiguous", "transposed", "strided")[k % 3] if layout == "mixed" else layout
        weights.append(poison_dropped(draw(shape, layout=how), seed, 0.4, mask))
        targets.append(None if target is None else draw(shape, target, "contiguous" if layout == "mixed" else how))
    mix_list(weights, targets, seeds, 0.4, mask, dtype)


def test_list_of_weights_at_odd_addresses():
    """Addresses and widths that no 16-byte load may assume anything of."""
    memory = torch.randn(2, 4000)
    weights = [memory[0][1:1001].view(20, 50), memory[0][1003:2003].view(25, 40)]
    targets = [memory[1][3:1003].view(20, 50), memory[1][1005:2005].view(25, 40)]
    mix_list(weights, targets, torch.tensor([1, 2]), 0.5, "weight", torch.float32)


def test_one_launch_for_weights_of_one_kind(monkeypatch):
    launches = []
    monkeypatch.setattr(mix_list_module, "launch", lambda kernel, *arguments, **options: launches.append(kernel))
    weights = [torch.zeros(n, 16) for n in range(1, 40)]
    backend.mixout_list(weights, weights, weights, torch.arange(39), 0.5, "neuron")
    assert len(launches) == 1


def test_scale_is_the_callers():
    w = torch.randn(63, 100)
    keep = mk.reference.keep_mask(SEED, p=0.5, shape=w.shape)
    assert torch.equal(backend.mixout(w, None, SEED, 0.5, 0.25, "neuron"), torch.where(keep, w * 0.25, 0.0))
