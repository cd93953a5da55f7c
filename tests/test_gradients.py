"""Derivatives against finite differences in float64, and what happens to second ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import mixout_kernels as mk

from . import axes, budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem_of(case, mask, target=True, bias=True, **options):
    case.require(torch.float64)
    return budget.random_problem(
        (2, 3), 7, 5, dtype=torch.float64, device=case.device, p=0.6, mask=mask, target=target, bias=bias, **options
    )


def layer(problem, backend):
    def call(x, w, b=None):
        return mk.mix_linear(x, w, problem.u, b, p=problem.p, mask=problem.mask, seed=problem.seed, backend=backend)

    return call


@axes.masks
@axes.targets
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@axes.transposed
def test_mix_linear(any_case, mask, target, bias, transposed):
    problem = problem_of(any_case, mask, target, bias, transposed=transposed)
    assert mask == "layer" or 0 < problem.keep.sum() < problem.keep.numel()
    leaves = tuple(leaf for leaf in budget.leaves(problem) if leaf is not None)
    assert gradcheck(layer(problem, any_case.backend), leaves)


@axes.masks
@pytest.mark.parametrize("needs", ["x", "w", "b"])
def test_mix_linear_in_one_input(any_case, mask, needs):
    problem = problem_of(any_case, mask)
    leaves = budget.leaves(problem)
    for leaf, name in zip(leaves, "xwb", strict=True):
        leaf.requires_grad_(name == needs)
    assert gradcheck(layer(problem, any_case.backend), leaves)


@axes.masks
@axes.targets
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 2)], ids=str)
def test_mixout_first_and_second(any_case, mask, target, shape):
    any_case.require(torch.float64)
    w, u = torch.randn(2, *shape, dtype=torch.float64, device=any_case.device)
    u = None if target is None else u
    w.requires_grad_()

    def call(w):
        return mk.mixout(w, u, p=0.6, mask=mask, seed=3, backend=any_case.backend)

    assert gradcheck(call, (w,))
    # Phi is linear in w, so its own second derivative says nothing: that of its cube does.
    assert gradgradcheck(lambda w: call(w) ** 3, (w,))


@axes.masks
def test_second_derivative_of_the_reference(mask):
    problem = budget.random_problem((2, 3), 7, 5, dtype=torch.float64, p=0.6, mask=mask)
    assert gradgradcheck(lambda *leaves: layer(problem, "reference")(*leaves) ** 2, budget.leaves(problem))


@axes.masks
def test_second_derivative_of_mixout_and_linear(case, mask):
    """The way that the error message below recommends."""
    problem = problem_of(case, mask)

    def call(x, w, b):
        phi = mk.mixout(w, problem.u, p=problem.p, mask=mask, seed=problem.seed, backend=case.backend)
        return F.linear(x, phi, b) ** 2

    assert gradgradcheck(call, budget.leaves(problem))


@axes.masks
def test_second_derivative_of_mix_linear_says_that_there_is_none(case, mask):
    problem = budget.random_problem((3,), 7, 5, device=case.device, p=0.6, mask=mask)
    x, w, b = budget.leaves(problem)
    y = layer(problem, case.backend)(x, w, b)
    (dw,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives exist only with backend='reference'"):
        dw.sum().backward()


@axes.masks
def test_create_graph_gives_the_same_first_derivative(case, mask):
    problem = budget.random_problem((3,), 7, 5, device=case.device, p=0.6, mask=mask)
    expected = budget.ours(problem, case.backend)
    leaves = budget.leaves(problem)
    y = layer(problem, case.backend)(*leaves)
    for gradient, name in zip(torch.autograd.grad(y, leaves, problem.g, create_graph=True), "xwb", strict=True):
        assert torch.equal(gradient, getattr(expected, f"d{name}"))


def test_backward_twice_through_a_retained_graph(any_case):
    problem = budget.random_problem((3,), 7, 5, device=any_case.device, p=0.5, integers=True)
    x, w, b = budget.leaves(problem)
    y = layer(problem, any_case.backend)(x, w, b)
    y.backward(problem.g, retain_graph=True)
    once = w.grad.clone()
    y.backward(problem.g)
    assert torch.equal(w.grad, 2 * once)


def test_changing_the_weight_before_backward_is_an_error(any_case):
    """The weight is saved by reference: autograd's version counter must know that it was."""
    problem = budget.random_problem((3,), 7, 5, device=any_case.device, p=0.5)
    x, w, b = budget.leaves(problem)
    y = layer(problem, any_case.backend)(x, w, b)
    with torch.no_grad():
        w.add_(1)
    if any_case.backend == "reference":
        y.sum().backward()  # it saved the mixed weight
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("with_sampler", [False, True], ids=["", "sampler"])
def test_forward_mode(device, with_sampler):
    """dy = dx Phi^T, by the reference."""
    torch.manual_seed(0)
    model = nn.Sequential(mk.MixLinear.from_linear(nn.Linear(20, 7), p=0.5)).to(device, torch.float64)
    if with_sampler:
        mk.MixSampler(model, seed=1)
    layer, (x, dx) = model[0], torch.randn(2, 5, 20, dtype=torch.float64, device=device)
    layer.target.add_(1)

    def run(x):
        torch.manual_seed(1)  # the same mask in each call
        return model(x)

    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(run(forward_ad.make_dual(x, dx)))
    torch.testing.assert_close(y, run(x))
    torch.testing.assert_close(dy, run(dx) - layer.bias)
