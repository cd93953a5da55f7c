"""torch.autocast: mixed in the weight's float32, rounded once; gradients in the dtype of their parameters."""

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk

from . import axes, budget

LOW = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem_of(case, mask, low, target=True, **options):
    case.require(torch.float32, target if isinstance(target, torch.dtype) else None, low)
    return budget.random_problem((9,), 100, 63, device=case.device, p=0.7, mask=mask, target=target, **options)


def call(problem, case, x, w, b, low):
    with torch.autocast(case.device, low):
        return mk.mix_linear(
            x, w, problem.u, b, p=problem.p, mask=problem.mask, seed=problem.seed, backend=case.backend
        )


@axes.masks
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("target", [True, None, torch.bfloat16], ids=str)
@axes.transposed
def test_the_weight_is_mixed_in_float32_and_rounded_once(any_case, mask, low, target, transposed):
    problem = problem_of(any_case, mask, low, target, transposed=transposed)
    w, u = problem.w, problem.u
    phi = mk.reference.mixout(w, u, p=0.7, mask=mask, seed=problem.seed).to(low)
    y = call(problem, any_case, torch.eye(100, device=any_case.device), w, None, low)
    assert y.dtype == low
    dropped = ~problem.keep
    assert torch.equal(y.t()[dropped], phi[dropped])
    if any_case.device == "cpu" and not any_case.emulated:
        assert torch.equal(y.t(), phi)
    else:  # a fused multiply-add may round a kept entry the other way, by one unit in the last place at most
        w64, u64 = w.double(), torch.zeros_like(w).double() if u is None else u.double()
        exact = torch.where(problem.keep, u64 + (w64 - u64) * problem.scale, u64)
        budget.assert_close(y.t(), exact, phi, norm1=exact.abs(), norm2=0, dtype=low)


@axes.masks
@pytest.mark.parametrize("low", LOW, ids=str)
@axes.targets
@pytest.mark.parametrize("backward_inside", [False, True], ids=["", "backward-inside"])
def test_values_and_gradients(any_case, mask, low, target, backward_inside):
    problem = problem_of(any_case, mask, low, target)
    problem.g = problem.g.to(low)
    x, w, b = budget.leaves(problem)
    y = call(problem, any_case, x, w, b, low)
    with torch.autocast(any_case.device, low, enabled=backward_inside):
        y.backward(problem.g)
    assert y.dtype == low
    assert all(leaf.grad.dtype == torch.float32 for leaf in (x, w, b))

    x2, w2, b2 = budget.leaves(problem)
    with torch.autocast(any_case.device, low):
        plain = F.linear(x2, budget.plain_mixout(w2, problem.u, problem.keep, problem.scale), b2)
    plain.backward(problem.g)

    exact, (norm1, norm2) = budget.truth(problem), budget.magnitudes(problem)
    got = budget.Results(y.detach(), x.grad, w.grad, b.grad)
    torchs = budget.Results(plain.detach(), x2.grad, w2.grad, b2.grad)
    for name, terms in {"y": 101, "dx": 63, "dw": 9, "db": 9}.items():
        budget.assert_close(
            getattr(got, name),
            getattr(exact, name),
            getattr(torchs, name),
            norm1=getattr(norm1, name),
            norm2=getattr(norm2, name),
            dtype=low if name == "y" else torch.float32,
            rounding=low,
            terms=terms,
            scale=problem.scale,
            name=name,
        )


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.5, "training": False}], ids=str)
def test_p_0_and_eval_mode_are_autocast_linear(any_case, options):
    problem = problem_of(any_case, "neuron", torch.bfloat16)
    with torch.autocast(any_case.device, torch.bfloat16):
        y = mk.mix_linear(problem.x, problem.w, problem.u, problem.b, backend=any_case.backend, **options)
        assert torch.equal(y, F.linear(problem.x, problem.w, problem.b))
        assert y.dtype == torch.bfloat16


@axes.masks
def test_input_that_is_low_already(any_case, mask):
    """What arrives from the layer before: a bfloat16 activation at a float32 weight."""
    problem = problem_of(any_case, mask, torch.bfloat16)
    x, w, b = budget.leaves(problem)
    low = problem.x.bfloat16().requires_grad_()
    expected = call(problem, any_case, x, w, b, torch.bfloat16)
    y = call(problem, any_case, low, w, b, torch.bfloat16)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert w.grad.dtype == torch.float32


def test_float64_stays_float64(any_case):
    any_case.require(torch.float64)
    problem = budget.random_problem((5,), 20, 10, dtype=torch.float64, device=any_case.device)
    expected = budget.ours(problem, any_case.backend).y
    with torch.autocast(any_case.device, torch.bfloat16):
        y = mk.mix_linear(
            problem.x, problem.w, problem.u, problem.b, p=0.7, seed=problem.seed, backend=any_case.backend
        )
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


def test_mixout_is_not_touched_by_autocast(any_case):
    problem = problem_of(any_case, "weight", torch.bfloat16)
    expected = mk.mixout(problem.w, problem.u, p=0.7, seed=5, backend=any_case.backend)
    with torch.autocast(any_case.device, torch.bfloat16):
        phi = mk.mixout(problem.w, problem.u, p=0.7, seed=5, backend=any_case.backend)
    assert phi.dtype == torch.float32
    assert torch.equal(phi, expected)


def test_what_no_kernel_can_do_falls_back_to_the_reference(device):
    """A float16 weight under bfloat16 autocast: right results from the reference, and an error for a named backend."""
    problem = budget.random_problem((9,), 100, 63, dtype=torch.float16, device=device)

    def call(backend):
        with torch.autocast(device, torch.bfloat16):
            return mk.mix_linear(problem.x, problem.w, problem.u, problem.b, p=0.7, seed=problem.seed, backend=backend)

    assert torch.equal(call(None), call("reference"))
    for backend in ("cpu", "triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"^backend='{backend}' was asked for, but"):
            call(backend)
