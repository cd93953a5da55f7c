"""torch.utils.checkpoint: the recomputed forward draws the same masks, so the gradients are the same bits."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import mixout_kernels as mk
from mixout_kernels import _extension, draws

from . import axes


def model_of(device, mask):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 20), nn.Linear(20, 4)).to(device)
    mk.apply_mixout(model, p=0.5, mask=mask)
    for parameter in model.parameters():
        parameter.data.add_(0.1)  # away from the target
    return model


def step(model, x, run):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(9)
    loss = run(model, x).square().sum()
    loss.backward()
    return [loss.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@axes.masks
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_equal_those_without(device, mask, use_reentrant):
    model, x = model_of(device, mask), torch.randn(6, 20, device=device)
    expected = step(model, x, lambda model, x: model(x))
    variants = {
        "whole": lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant),
        "in segments": lambda model, x: checkpoint_sequential(model, 3, x, use_reentrant=use_reentrant),
    }
    for name, run in variants.items():
        for ours, plain in zip(step(model, x, run), expected, strict=True):
            assert torch.equal(ours, plain), name
    # The masks matter here: another draw gives other gradients.
    others = [step(model, x, lambda model, x, s=s: torch.manual_seed(s) and model(x)) for s in range(10, 16)]
    assert any(not torch.equal(other[2], expected[2]) for other in others)


def test_without_the_generator_state_the_masks_differ(device):
    """preserve_rng_state=False breaks dropout, and mixout with it: the seed is drawn, not stored by the module."""
    model, x = model_of(device, "weight"), torch.randn(6, 20, device=device)
    expected = step(model, x, lambda model, x: model(x))
    broken = step(model, x, lambda model, x: checkpoint(model, x, use_reentrant=True, preserve_rng_state=False))
    assert torch.equal(broken[0], expected[0])
    assert not torch.equal(broken[2], expected[2])


@pytest.mark.parametrize("mask", draws.KINDS)
def test_a_recomputation_by_another_mask_is_an_error(mask):
    """Where the layer's own backward sees both seeds, which the CPU backend does."""
    if _extension.load()[0] is None:
        pytest.skip("NO COMPILED EXTENSION HERE")
    model, x = model_of("cpu", mask), torch.randn(6, 20)
    # A neuron mask may be caught by torch first: another number of columns is kept.
    expected = r"recomputed with another mask|Recomputed values .* have different metadata"
    with pytest.raises(RuntimeError, match=expected):
        step(model, x, lambda model, x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_autocast(device, use_reentrant):
    model, x = model_of(device, "neuron"), torch.randn(6, 20, device=device)

    def run(model, x, through=lambda model, x: model(x)):
        with torch.autocast(device, torch.bfloat16):
            return through(model, x).float()

    expected = step(model, x, run)
    got = step(model, x, lambda m, x: run(m, x, lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant)))
    for ours, plain in zip(got, expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_only_the_input_is_kept(device, use_reentrant):
    model, x = model_of(device, "neuron"), torch.randn(6, 20, device=device).requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        checkpoint(model, x, use_reentrant=use_reentrant)
    # The empty tensor by which torch up to 2.11 marks where recomputation begins is no memory.
    assert {size for size in sizes if size} <= {x.numel()}
