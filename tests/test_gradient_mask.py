"""The gradient mask beside the mix: grad_p and rescale, from the same word with a threshold of its own.

Expected values with a seed were computed by an independent Philox in Python integers.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import mixout_kernels as mk
from mixout_kernels import draws
from mixout_kernels.draws import GradientMask

from . import axes, budget

G, X = [[1.0, -2.0, 0.5], [0.0, 1.0, 2.0]], [[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.0, 2.0]]


def gradient_of(case, *, g=G, x=X, w=None, u=None, **options):
    x, g = torch.tensor(x, device=case.device), torch.tensor(g, device=case.device)
    w = torch.ones(g.shape[1], x.shape[1], device=case.device) if w is None else w
    w = w.detach().requires_grad_()
    mk.mix_linear(x, w, u, backend=case.backend, **options).backward(g)
    return w.grad.cpu()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mask": "neuron"}, [[2, 4, 0, 0], [-6, -7, 0, 0], [-3, 4, 0, 0]]),
        ({"mask": "neuron", "rescale": False}, [[1, 2, 0, 0], [-3, -3.5, 0, 0], [-1.5, 2, 0, 0]]),
        ({"mask": "weight"}, [[2, 4, 0, 0], [0, -7, 0, -12], [0, 0, 3, 12]]),
    ],
    ids=str,
)
def test_known_values(any_case, options, expected):
    dw = gradient_of(any_case, p=0.0, grad_p=0.5, seed=7, **options)
    assert torch.equal(dw, torch.tensor(expected))


def test_known_values_of_mixout_and_graddrop_from_one_word(any_case):
    """p = 0.4 keeps columns 1011 of seed 13, q = 0.7 keeps 0011 of them; g^T x is the identity times its values."""
    assert GradientMask.of(0.4, 0.5).q == pytest.approx(0.7)
    kept = mk.reference.keep_mask(13, p=0.4, shape=(2, 4)), mk.reference.keep_mask(13, p=0.7, shape=(2, 4))
    assert [k.int().tolist() for k in kept] == [[1, 0, 1, 1], [0, 0, 1, 1]]
    dw = gradient_of(any_case, p=0.4, grad_p=0.5, seed=13, g=[[1.0, -2.0], [0.0, 1.0]], x=X)
    expected = torch.tensor([[1.0, -2.0], [0.0, 1.0]]).t() @ torch.tensor(X) / 0.3
    expected[:, :2] = 0
    torch.testing.assert_close(dw, expected)


@axes.masks
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("grad_p", [0.3, 0.9])
@axes.targets
def test_within_the_error_budget(any_case, mask, p, grad_p, target):
    for dtype in (torch.float32, torch.bfloat16):
        any_case.require(dtype)
        problem = budget.random_problem(
            (3, 11), 40, 24, dtype=dtype, device=any_case.device, p=p, mask=mask, target=target, grad_p=grad_p
        )
        for schedule in any_case.schedules(dtype):
            budget.assert_in_budget(problem, budget.ours(problem, any_case.backend, schedule=schedule))


@axes.masks
@axes.transposed
def test_exact_on_integers(any_case, mask, transposed, poisoned_memory):
    """Powers of two as factors, so that nothing is rounded: bit for bit the reference, in both layouts."""
    problem = budget.random_problem(
        (6,), 40, 24, device=any_case.device, p=0.5, mask=mask, transposed=transposed, integers=True, grad_p=0.75
    )
    expected = budget.ours(problem, "reference")
    for schedule in any_case.schedules():
        results = budget.ours(problem, any_case.backend, schedule=schedule)
        for name in budget.RESULTS:
            assert torch.equal(getattr(results, name), getattr(expected, name)), name


@axes.masks
def test_without_a_mix_y_and_dx_are_f_linear_bit_for_bit(any_case, mask):
    problem = budget.random_problem((50,), 192, 100, device=any_case.device, p=0.0, mask=mask, grad_p=0.5)
    x, w, b = budget.leaves(problem)
    y = F.linear(x, w, b)
    y.backward(problem.g)
    schedule = None if any_case.backend == "reference" else "staged"
    results = budget.ours(problem, any_case.backend, schedule=schedule)
    assert torch.equal(results.y, y)
    assert torch.equal(results.dx, x.grad)
    assert torch.equal(results.db, b.grad)


def test_nothing_to_drop_is_f_linear(any_case):
    problem = budget.random_problem((5,), 40, 24, device=any_case.device, p=0.0)
    y = mk.mix_linear(*budget.leaves(problem)[:2], problem.u, p=0.0, grad_p=0.0, backend=any_case.backend)
    assert type(y.grad_fn).__name__ == type(F.linear(*budget.leaves(problem)[:2]).grad_fn).__name__


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@axes.masks
def test_a_rate_of_one_leaves_no_gradient(any_case, p, mask):
    problem = budget.random_problem((5,), 40, 24, device=any_case.device, p=p, mask=mask, grad_p=1.0, integers=True)
    results = budget.ours(problem, any_case.backend)
    assert results.dw.shape == problem.w.shape
    assert not results.dw.any()
    without = budget.ours(budget.replace(problem, grad_p=0.0), any_case.backend)
    assert torch.equal(results.y, without.y)
    assert torch.equal(results.dx, without.dx)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_infinite_gradient_does_not_reach_what_is_dropped(any_case, p):
    problem = budget.random_problem((5,), 40, 24, device=any_case.device, p=p, grad_p=0.5)
    problem.g[0, 0] = torch.inf
    for schedule in any_case.schedules():
        dw = budget.ours(problem, any_case.backend, schedule=schedule).dw
        assert not dw[~problem.keep_gradient].any()
        assert not dw[0, problem.keep_gradient[0]].isfinite().any()


@axes.masks
def test_of_a_parameter_by_itself(any_case, mask):
    w, u = torch.randn(2, 12, 20, device=any_case.device)
    for p in (0.0, 0.5):
        w = w.detach().requires_grad_()
        phi = mk.mixout(w, u, p=p, grad_p=0.75, mask=mask, seed=3, backend=any_case.backend)
        expected = mk.mixout(w.detach(), u, p=p, mask=mask, seed=3, backend=any_case.backend)
        assert torch.equal(phi, expected)
        phi.backward(torch.ones_like(phi))
        q = 1 - (1 - p) * 0.25
        keep = budget._reference_mask(3, q, w.shape, mask).expand(w.shape).to(w.device)
        assert torch.equal(w.grad, torch.where(keep, 4 / (1 - p), 0.0))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("paper_gradient", [True, False])
def test_each_factor_by_itself(any_case, rescale, paper_gradient):
    dw = gradient_of(any_case, p=0.5, grad_p=0.75, seed=3, rescale=rescale, paper_gradient=paper_gradient)
    plain = gradient_of(any_case, p=0.5, grad_p=0.75, seed=3, rescale=False, paper_gradient=True)
    assert torch.equal(dw, plain * (4 if rescale else 1) * (1 if paper_gradient else 2))


def test_the_two_masks_are_independent():
    """Of 200,000 words: mixed and with a gradient (1 - p)(1 - grad_p), mixed (1 - p); one word has both decisions."""
    p, grad_p, n = 0.3, 0.6, 200_000
    mix = mk.keep_mask(5, p=p, shape=(n,))
    gradient = mk.keep_mask(5, p=GradientMask.of(p, grad_p).q, shape=(n,))
    assert not (gradient & ~mix).any()
    assert mix.float().mean().item() == pytest.approx(1 - p, abs=0.005)
    assert gradient[mix].float().mean().item() == pytest.approx(1 - grad_p, abs=0.005)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_redraws_the_same_masks(any_case, use_reentrant):
    problem = budget.random_problem((5,), 40, 24, device=any_case.device, p=0.4, grad_p=0.5)

    def layer(x, w):
        return mk.mix_linear(x, w, problem.u, p=0.4, grad_p=0.5, backend=any_case.backend)

    gradients = []
    for call in (layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=use_reentrant)):
        x, w, _ = budget.leaves(problem)
        torch.manual_seed(11)
        call(x, w).backward(problem.g)
        gradients.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_under_autocast_dw_has_the_weights_dtype(case):
    case.require(torch.float32, compute=torch.bfloat16)
    problem = budget.random_problem((5,), 40, 24, device=case.device, p=0.0, grad_p=0.5, integers=True)
    x, w, _ = budget.leaves(problem)
    with torch.autocast(case.device, torch.bfloat16):
        y = mk.mix_linear(x, w, None, p=0.0, grad_p=0.5, seed=problem.seed, backend=case.backend)
    assert y.dtype == torch.bfloat16
    y.backward(problem.g.bfloat16())
    assert w.grad.dtype == torch.float32
    exact = 2 * (problem.g.t() @ problem.x)  # small integers: exact in bfloat16 products with float32 sums
    assert torch.equal(w.grad, torch.where(problem.keep_gradient, exact, 0.0).bfloat16().float())


@axes.masks
def test_saves_what_the_gradient_keeps(case, mask):
    problem = budget.random_problem((33,), 400, 300, device=case.device, p=0.4, mask=mask, grad_p=0.5)
    x, w, b = budget.leaves(problem)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mk.mix_linear(x, w, problem.u, b, p=0.4, grad_p=0.5, mask=mask, backend=case.backend)
    known = {t.data_ptr() for t in (w, b, problem.u)}
    (activation,) = (t for t in saved.values() if t.data_ptr() not in known and t.numel() > 1)
    if not draws.shares_columns(draws.strides_of(mask, w.shape)):
        assert activation.data_ptr() == x.data_ptr()
    elif case.device == "cuda" or case.backend == "cuda":  # its plans have the capacity in emulation, too
        assert activation.shape == (33, draws.column_capacity(400, 0.7))
    else:
        assert activation.shape[1] < 0.4 * 400  # 0.3 of the columns, not 0.6


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@axes.masks
def test_compiled_equals_eager(device, backend, mask):
    problem = budget.random_problem((6,), 40, 24, device=device, p=0.5, mask=mask, grad_p=0.75, integers=True)

    def call(x, w, b):
        return mk.mix_linear(x, w, problem.u, b, p=0.5, grad_p=0.75, mask=mask, seed=problem.seed)

    results = []
    for function in (call, torch.compile(call, backend=backend, fullgraph=True)):
        x, w, b = budget.leaves(problem)
        y = function(x, w, b)
        y.backward(problem.g)
        results.append((y, x.grad, w.grad, b.grad))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad_p": 1.5}, ValueError, r"grad_p: expected a number in \[0, 1\], got 1.5"),
        ({"grad_p": float("nan")}, ValueError, r"grad_p: expected a number in \[0, 1\], got nan"),
        ({"grad_p": "0.5"}, TypeError, r"grad_p: expected a number in \[0, 1\], got str"),
        ({"grad_p": True}, TypeError, r"grad_p: expected a number in \[0, 1\], got bool"),
        ({"grad_p": 0.5, "rescale": 1}, TypeError, "rescale: expected True or False, got 1"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(error, match=f"^mix_linear: {message}$"):
        mk.mix_linear(x, w, None, p=0.5, **options)
    with pytest.raises(error, match=f"^mixout: {message}$"):
        mk.mixout(w, None, p=0.5, **options)
