"""The mask: bit for bit the reference's on every backend, and Bernoulli(1 - p) within binomial bounds."""

import itertools
import math

import pytest
import torch

import mixout_kernels as mk

from . import axes

SEEDS = [0, 1, -1, 12345, 2**63 - 1, -(2**63), 2**63 + 5, 2**64 - 1]
PROBABILITIES = [0.0, 1e-12, 1e-9, 0.1, 0.5, 0.7, 0.999, math.nextafter(1.0, 0.0), 1.0]
# 1024 and 16384 are block and thread sizes of the CPU loops; the others leave remainders of every kind.
LENGTHS = [1, 2, 3, 5, 63, 100, 1023, 1024, 1025, 16385]


def signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


def backend_mask(case, seed, p, shape, mask):
    """What ``mk.keep_mask`` asks this backend for: the decisions of the dimensions that have their own."""
    seed = torch.tensor([signed(seed)], dtype=torch.int64, device=case.device)
    with mk.kernels(backend=case.backend):
        return mk.keep_mask(seed, p=p, shape=shape, mask=mask).cpu()


def reference_mask(seed, p, shape, mask="neuron"):
    return mk.reference.keep_mask(signed(seed), p=p, shape=shape, mask=mask)


def bound(n, p):
    """Six standard deviations of Binomial(n, p): a correct mask passes it with probability 2e-9 a draw."""
    return 6 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", PROBABILITIES)
def test_equals_the_reference(case, seed, p):
    for mask in axes.MASKS:
        shape = (37, 63)
        assert torch.equal(backend_mask(case, seed, p, shape, mask), reference_mask(seed, p, shape, mask))


@pytest.mark.parametrize("n", LENGTHS)
def test_equals_the_reference_for_every_length(case, n):
    for shape, mask in [
        ((3, n), "neuron"),
        ((3, n), "weight"),
        ((n, 3), "weight"),
        ((n,), "neuron"),
        ((2, n, 2), "neuron"),
    ]:
        assert torch.equal(backend_mask(case, 99, 0.5, shape, mask), reference_mask(99, 0.5, shape, mask)), (
            shape,
            mask,
        )


def test_equals_the_reference_over_several_threads(case):
    case.skip_if_emulated("a million words take minutes in an emulation")
    shape = (1009, 1021)
    assert torch.equal(backend_mask(case, 7, 0.7, shape, "weight"), reference_mask(7, 0.7, shape, "weight"))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
@axes.masks
def test_empty(case, shape, mask):
    assert backend_mask(case, 1, 0.5, shape, mask).shape == reference_mask(1, 0.5, shape, mask).shape


@axes.masks
def test_public_function(device, mask):
    seed = torch.tensor([77], dtype=torch.int64, device=device)
    for shape in [(6, 5), (7,), (3, 4, 5)]:
        keep = mk.keep_mask(seed, p=0.4, shape=shape, mask=mask)
        assert keep.device == seed.device
        assert keep.dtype == torch.bool
        own = {"weight": shape, "neuron": shape[1:2] or shape, "output": shape[:1], "layer": ()}
        assert keep.shape == own[mask]
        assert torch.equal(keep.cpu(), reference_mask(77, 0.4, shape, mask))


def test_public_function_takes_ints_of_either_sign():
    assert torch.equal(mk.keep_mask(2**64 - 3, p=0.5, shape=(500,)), mk.keep_mask(-3, p=0.5, shape=(500,)))
    assert torch.equal(mk.keep_mask(-3, p=0.5, shape=(500,)), reference_mask(-3, 0.5, (500,)))


def test_is_a_function_of_the_index_alone():
    """No shape, no block size: a longer mask begins with the shorter one, and the weight mask is row-major."""
    whole = reference_mask(3, 0.5, (1, 1000))
    assert torch.equal(reference_mask(3, 0.5, (9, 63)), whole[:63])
    assert torch.equal(reference_mask(3, 0.5, (20, 50), "weight").flatten(), whole)
    assert torch.equal(reference_mask(3, 0.5, (10, 20, 5), "weight").flatten(), whole)


def test_grows_with_p():
    """A higher p drops more, and drops everything that a lower one does."""
    masks = [reference_mask(11, p, (5000,)) for p in (0.0, 0.2, 0.5, 0.9, 1.0)]
    for lower, higher in itertools.pairwise(masks):
        assert not (higher & ~lower).any()
        assert (lower & ~higher).any()
    assert masks[0].all()
    assert not masks[-1].any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
def test_drop_rate(any_case, p, seed):
    n = 2**14 if any_case.emulated else 2**18
    keep = (reference_mask if any_case.backend == "reference" else lambda *a: backend_mask(any_case, *a))(
        seed, p, (n,), "weight"
    )
    assert abs((~keep).sum().item() - n * p) <= bound(n, p)


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_neuron_drop_rate_over_seeds(p):
    """Consecutive seeds, as a user who counts steps would give them: each draw is a fresh Bernoulli vector."""
    keep = torch.stack([reference_mask(seed, p, (8, 64)) for seed in range(1000)])
    assert abs((~keep).sum().item() - keep.numel() * p) <= bound(keep.numel(), p)
    # Each feature by itself; 64 of them, each within six standard deviations.
    assert ((~keep).sum(0) - 1000 * p).abs().max() <= bound(1000, p)


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_other_seeds_and_neighbours_are_independent(p):
    n, agree = 2**16, p**2 + (1 - p) ** 2
    keep = reference_mask(5, p, (n,))
    for other in (reference_mask(6, p, (n,)), reference_mask(5 + 2**32, p, (n,)), reference_mask(-5, p, (n,))):
        assert abs((keep == other).sum().item() - n * agree) <= bound(n, agree)
    for distance in (1, 2, 3, 4, 5, 64):
        pairs = (keep[::2][: n // 4] == keep.roll(distance)[::2][: n // 4]) if distance % 2 else None
        if pairs is not None:  # disjoint pairs, so that the agreements are independent
            assert abs(pairs.sum().item() - pairs.numel() * agree) <= bound(pairs.numel(), agree)


@axes.masks
def test_no_seed_draws_from_the_default_generator(device, mask):
    w = torch.randn(40, 50, device=device)
    x = torch.randn(3, 50, device=device)

    def draw():  # sixteen, since one decision for the whole layer is often the same twice
        mixed = [mk.mixout(w, None, p=0.5, mask=mask) for _ in range(16)]
        return torch.stack(mixed), torch.stack([mk.mix_linear(x, w, None, p=0.5, mask=mask) for _ in range(16)])

    torch.manual_seed(8)
    first, second = draw(), draw()
    torch.manual_seed(8)
    again = draw()
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, c)
        assert not torch.equal(a, b)
