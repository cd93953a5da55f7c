"""The layer as C++ records it (csrc/gpu), beside its reference: Python's Function and the primitives, bit for bit."""

from __future__ import annotations

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels import functional

from .. import axes, budget

OTHERS = {
    "grad_p": {"grad_p": 0.3},
    "all kept": {"p": 0.0, "grad_p": 0.4},
    "nothing kept": {"p": 1.0},
    "no gradient": {"grad_p": 1.0},
    "paper": {"paper_gradient": True},
}


def results(kernels, monkeypatch, run, *, in_python):
    with monkeypatch.context() as patch:
        if in_python:
            patch.setattr(kernels, "linear_plan", lambda call: None)
            # As on a device, also in emulation, where Python would read the mask: a GEMM of another width may round
            # differently.
            kept_width = functional._kept_width
            patch.setattr(functional, "_kept_width", lambda *of, exact: kept_width(*of, exact=False))
        functional._plan.cache_clear()
        y, *leaves = run()
        functional._plan.cache_clear()
        assert y.grad_fn.name() == ("MixLinearFunctionBackward" if in_python else "MixLinearBackward")
        torch.manual_seed(5)
        y.backward(torch.randn_like(y))
    return [y, *(leaf.grad for leaf in leaves if leaf is not None)]


def assert_equal(kernels, monkeypatch, run):
    recorded, reference = (results(kernels, monkeypatch, run, in_python=flag) for flag in (False, True))
    assert [t.dtype for t in recorded] == [t.dtype for t in reference]
    assert [torch.equal(a, b) for a, b in zip(recorded, reference, strict=True)] == [True] * len(recorded)


def layer(problem, *, transposed=False, bias=True, **settings):
    """A call of ``mix_linear``, as a function that makes its leaves anew."""

    def run():
        x = problem.x.detach().clone().requires_grad_()
        w = problem.w.detach().clone()
        w = (w.t().contiguous().t() if transposed else w).requires_grad_()
        b = problem.b.detach().clone().requires_grad_() if bias else None
        call = {"p": 0.6, "seed": 3, "backend": "cuda", **settings}
        return mk.mix_linear(x, w, problem.u, b, **call), x, w, b

    return run


@axes.gpu_dtypes
@axes.masks
@pytest.mark.parametrize("schedule", ["fused", "staged", None])
@axes.transposed
def test_every_schedule(kernels, device, monkeypatch, dtype, mask, schedule, transposed):
    problem = budget.random_problem((3, 5), 64, 48, dtype=dtype, device=device, mask=mask)
    assert_equal(kernels, monkeypatch, layer(problem, mask=mask, schedule=schedule, transposed=transposed))


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_method(kernels, device, monkeypatch, settings, bias):
    problem = budget.random_problem((7,), 33, 20, dtype=torch.float32, device=device, mask="neuron")
    assert_equal(kernels, monkeypatch, layer(problem, bias=bias, **settings))


@pytest.mark.parametrize("frozen", ["x", "w", "b"])
def test_what_needs_no_gradient_gets_none(kernels, device, monkeypatch, frozen):
    problem = budget.random_problem((7,), 32, 16, dtype=torch.float32, device=device, mask="neuron")
    run = layer(problem)

    def frozen_run():
        _, x, w, b = run()
        leaves = {"x": x, "w": w, "b": b}
        leaves[frozen].requires_grad_(False)
        y = mk.mix_linear(leaves["x"], leaves["w"], problem.u, leaves["b"], p=0.6, seed=3, backend="cuda")
        return y, *(leaf for name, leaf in leaves.items() if name != frozen)

    assert_equal(kernels, monkeypatch, frozen_run)


def test_phi_and_kept_columns_that_are_given(kernels, device, monkeypatch):
    """Under a sampler: siblings share x[:, kept], and what they were given is neither mixed nor gathered again."""

    def run():
        torch.manual_seed(1)
        model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 32, device=device) for name in ("query", "key")})
        mk.apply_mixout(model, p=0.6, exclude=())
        mk.MixSampler(model, seed=4, premix=True)
        x = torch.randn(2, 5, 64, device=device, requires_grad=True)
        with mk.kernels(backend="cuda"):
            y = model["query"](x) * 2
            y = model["key"](x)
        return y, x, *model["key"].parameters()

    assert_equal(kernels, monkeypatch, run)


def test_a_weight_changed_before_backward_is_an_error(kernels, device):
    problem = budget.random_problem((7,), 32, 16, dtype=torch.float32, device=device, mask="neuron")
    y, _, w, _ = layer(problem)()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_bias_is_cast_without_a_node_of_its_own(kernels, device):
    """And its gradient is rounded once, from the sum of g in float32."""
    problem = budget.random_problem((40,), 32, 16, dtype=torch.float32, device=device, mask="neuron")
    run = layer(problem)
    with torch.autocast(device, torch.bfloat16):
        y, _, _, b = run()
    assert y.dtype == torch.bfloat16
    g = torch.randn_like(y)
    y.backward(g)
    assert b.grad.dtype == torch.float32
    truth, terms = g.double().sum(0), g.double().abs().sum(0)
    assert ((b.grad.double() - truth).abs() <= len(g) ** 0.5 * torch.finfo(torch.float32).eps * terms).all()
