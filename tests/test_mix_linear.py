"""Values and gradients of the layer within the error budget of budget.py, for real-valued data."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk

from . import axes, budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_in_budget(problem, case, **options):
    for schedule in case.schedules(problem.x.dtype):
        results = budget.ours(problem, case.backend, schedule=schedule, **options)
        budget.assert_in_budget(problem, results)


@axes.dtypes
@axes.masks
@axes.targets
@pytest.mark.parametrize("p", [1e-9, 0.5, 0.7, 0.9, 1.0])
def test_dtypes_masks_and_probabilities(any_case, dtype, mask, target, p):
    any_case.require(dtype)
    for bias in (True, False):
        problem = budget.random_problem(
            (33,), 100, 63, dtype=dtype, device=any_case.device, p=p, mask=mask, target=target, bias=bias
        )
        assert_in_budget(problem, any_case)


@axes.masks
@axes.transposed
def test_bfloat16_target_of_a_float32_weight(any_case, mask, transposed):
    any_case.require(torch.float32, torch.bfloat16)
    problem = budget.random_problem(
        (33,), 100, 63, device=any_case.device, mask=mask, target=torch.bfloat16, transposed=transposed
    )
    assert_in_budget(problem, any_case)


@axes.masks
@axes.targets
@axes.wide_and_narrow
@pytest.mark.parametrize("shape", [(1, 1, 1), (1000, 63, 1), (1, 1000, 100), (100, 1000, 63), (63, 1, 1000)], ids=str)
def test_odd_sizes(any_case, mask, target, dtype, shape):
    any_case.require(dtype)
    rows, in_features, out_features = shape
    if rows * in_features * out_features > 10**6:
        any_case.skip_if_emulated("too many products")
    problem = budget.random_problem(
        (rows,), in_features, out_features, dtype=dtype, device=any_case.device, mask=mask, target=target
    )
    assert_in_budget(problem, any_case)


@axes.masks
@axes.targets
@pytest.mark.parametrize("p", [0.5, 0.9])
def test_many_rows(any_case, mask, target, p):
    any_case.skip_if_emulated("too many products")
    problem = budget.random_problem((2, 1024), 384, 200, device=any_case.device, p=p, mask=mask, target=target)
    assert_in_budget(problem, any_case)


@axes.masks
@axes.targets
@pytest.mark.parametrize("rows", [(), (5,), (2, 5), (2, 3, 4), (0,), (3, 0), (1, 1, 1)], ids=str)
def test_input_dimensions(any_case, mask, target, rows):
    problem = budget.random_problem(rows, 100, 63, device=any_case.device, mask=mask, target=target)
    assert_in_budget(problem, any_case)
    results = budget.ours(problem, any_case.backend)
    if 0 in rows:  # sums over nothing
        assert not results.dw.any()
        assert not results.db.any()


@pytest.mark.parametrize("in_features", [0, 5])
@pytest.mark.parametrize("out_features", [0, 5])
@axes.masks
@axes.targets
def test_no_features(any_case, in_features, out_features, mask, target):
    """nn.Linear allows either to be 0."""
    problem = budget.random_problem((3,), in_features, out_features, device=any_case.device, mask=mask, target=target)
    assert_in_budget(problem, any_case)


STRIDED = {
    "every second row": lambda t: t[::2],
    "every second column": lambda t: t[..., ::2],
    "transposed": lambda t: t.transpose(0, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "one element": lambda t: t.flatten()[:1].expand(t.shape),
    "reversed storage": lambda t: t.flip(0).unfold(0, 1, 1).squeeze(-1),
}


def strided_like(shape, view, device):
    """A normal tensor of ``shape`` that lies in memory as ``view`` leaves it."""
    base = [shape[1], shape[0], *shape[2:]] if view == "transposed" else list(shape)
    base[0] *= 2 if view == "every second row" else 1
    base[-1] *= 2 if view == "every second column" else 1
    t = STRIDED[view](torch.randn(base, generator=torch.Generator().manual_seed(3)).to(device))
    assert t.shape == shape
    return t


@axes.masks
@axes.targets
@pytest.mark.parametrize("view", list(STRIDED))
def test_strided_inputs_and_gradients(any_case, mask, target, view):
    problem = budget.random_problem((4, 6), 50, 30, device=any_case.device, mask=mask, target=target)
    problem.x = strided_like((4, 6, 50), view, any_case.device)
    problem.g = strided_like((4, 6, 30), view, any_case.device)
    assert_in_budget(problem, any_case)


@axes.masks
@axes.targets
def test_gradient_of_a_sum(any_case, mask, target):
    """``y.sum().backward()`` hands over one element, expanded to the output's shape with strides of zero."""
    problem = budget.random_problem((5,), 50, 30, device=any_case.device, mask=mask, target=target)
    problem.g = torch.ones((), device=any_case.device).expand(5, 30)
    assert_in_budget(problem, any_case)


@axes.masks
@pytest.mark.parametrize("view", ["transposed", "every second row", "every second column", "offset"])
@pytest.mark.parametrize("same", [True, False], ids=["both", "weight-only"])
@axes.wide_and_narrow
def test_strided_weights(any_case, mask, view, same, dtype):
    """Any layout of the weight, and a target that lies in memory as the weight does or otherwise."""
    any_case.require(dtype)
    problem = budget.random_problem((8,), 50, 30, device=any_case.device, mask=mask, dtype=dtype)
    lay = {
        "transposed": lambda t: t.t().contiguous().t(),
        "every second row": lambda t: torch.stack([t, t + 1], dim=1).flatten(0, 1)[::2],
        "every second column": lambda t: torch.stack([t, t + 1], dim=2).flatten(1, 2)[:, ::2],
        "offset": lambda t: F.pad(t, (3, 0, 1, 0))[1:, 3:],
    }[view]
    strided = budget.Problem(**{**vars(problem), "w": lay(problem.w), "u": lay(problem.u) if same else problem.u})
    assert torch.equal(strided.w, problem.w)
    assert not strided.w.is_contiguous()
    assert_in_budget(strided, any_case)
    strided.u = None
    assert_in_budget(strided, any_case)


@axes.masks
@pytest.mark.parametrize("p", [0.5, 0.9])
def test_paper_gradient_is_1_minus_p_times_the_true_one(any_case, mask, p):
    problem = budget.random_problem((20,), 63, 40, device=any_case.device, p=p, mask=mask)
    for schedule in any_case.schedules():
        results = budget.ours(problem, any_case.backend, schedule=schedule, paper_gradient=True)
        budget.assert_in_budget(problem, results, factor=lambda name: 1 - p if name == "dw" else 1.0)


@axes.masks
def test_strided_biases(any_case, mask):
    for view in (lambda b: torch.stack([b, b + 1], dim=1)[:, 0], lambda b: b[:1].expand(b.shape)):
        problem = budget.random_problem((8,), 48, 32, device=any_case.device, mask=mask)
        problem.b = view(problem.b)
        assert_in_budget(problem, any_case)


@axes.masks
@pytest.mark.parametrize("rows", [(), (6,), (2, 3)], ids=str)
def test_the_output_can_be_modified_in_place(any_case, mask, rows):
    """``nn.Linear`` before ``nn.ReLU(inplace=True)``, or ``h = layer(x); h += residual``."""
    problem = budget.random_problem(rows, 48, 32, device=any_case.device, mask=mask)
    for schedule in any_case.schedules():
        gradients = []
        for in_place in (True, False):
            x, w, b = budget.leaves(problem)
            y = mk.mix_linear(x, w, problem.u, b, p=0.5, mask=mask, seed=3, backend=any_case.backend, schedule=schedule)
            z = y.mul_(2).relu_() if in_place else (y * 2).relu()
            gradients.append((z.detach(), *torch.autograd.grad(z, (x, w, b), problem.g)))
        for ours, expected in zip(*gradients, strict=True):
            assert torch.equal(ours, expected)


@axes.masks
def test_the_same_seed_gives_the_same_bits(any_case, mask):
    problem = budget.random_problem((40,), 100, 63, device=any_case.device, mask=mask)
    for schedule in any_case.schedules():
        first = budget.ours(problem, any_case.backend, schedule=schedule)
        again = budget.ours(problem, any_case.backend, schedule=schedule)
        for name in budget.RESULTS:
            assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_seeds_as_ints_and_tensors(any_case):
    problem = budget.random_problem((4,), 20, 10, device=any_case.device, p=0.5)

    def y(seed):
        return mk.mix_linear(problem.x, problem.w, problem.u, p=0.5, seed=seed, backend=any_case.backend)

    tensor = torch.tensor([-7], dtype=torch.int64, device=any_case.device)
    for seed in (2**64 - 7, tensor, tensor[0], tensor.reshape(1, 1)):
        assert torch.equal(y(seed), y(-7))
    assert not torch.equal(y(-8), y(-7))


@axes.masks
@axes.targets
@pytest.mark.parametrize("needs", ["x", "w", "b", "xw", "xb", "wb", "xwb", ""])
def test_gradients_that_are_asked_for(any_case, mask, target, needs):
    problem = budget.random_problem((7,), 63, 20, device=any_case.device, mask=mask, target=target)
    expected = budget.ours(problem, any_case.backend)
    x, w, b = budget.leaves(problem)
    for leaf, name in ((x, "x"), (w, "w"), (b, "b")):
        leaf.requires_grad_(name in needs)
    y = mk.mix_linear(x, w, problem.u, b, p=problem.p, mask=mask, seed=problem.seed, backend=any_case.backend)
    assert torch.equal(y, expected.y)
    assert y.requires_grad == bool(needs)
    if needs:
        y.backward(problem.g)
    for leaf, name in ((x, "x"), (w, "w"), (b, "b")):
        assert (leaf.grad is not None) == (name in needs)
        if name in needs:
            assert torch.equal(leaf.grad, getattr(expected, f"d{name}"))


@axes.masks
def test_no_grad_and_inference_mode(any_case, mask):
    problem = budget.random_problem((7,), 63, 20, device=any_case.device, mask=mask)
    x, w, b = budget.leaves(problem)

    def y():
        return mk.mix_linear(x, w, problem.u, b, p=problem.p, mask=mask, seed=problem.seed, backend=any_case.backend)

    expected = y().detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            result = y()
        assert not result.requires_grad
        assert torch.equal(result, expected)


def test_gradients_accumulate_over_calls(any_case):
    problem = budget.random_problem((7,), 63, 20, device=any_case.device, integers=True, p=0.5)
    once = budget.ours(problem, any_case.backend)
    x, w, b = budget.leaves(problem)
    for _ in range(2):
        mk.mix_linear(x, w, problem.u, b, p=0.5, seed=problem.seed, backend=any_case.backend).backward(problem.g)
    assert torch.equal(w.grad, 2 * once.dw)
    assert torch.equal(b.grad, 2 * once.db)
    assert torch.equal(x.grad, 2 * once.dx)


# --- p = 0, p = 1 and eval mode ---------------------------------------------------------------------------------------


@axes.dtypes
@axes.masks
@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0}, {"p": 0.7, "training": False}], ids=str)
def test_p_0_and_eval_mode_are_linear(any_case, dtype, mask, options):
    problem = budget.random_problem((33,), 100, 63, dtype=dtype, device=any_case.device, mask=mask)
    saved = []
    x, w, b = budget.leaves(problem)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = mk.mix_linear(x, w, problem.u, b, mask=mask, backend=any_case.backend, **options)
    y.backward(problem.g)
    assert set(saved) <= {x.data_ptr(), w.data_ptr()}, "a copy was made"
    x2, w2, b2 = budget.leaves(problem)
    plain = F.linear(x2, w2, b2)
    plain.backward(problem.g)
    assert torch.equal(y, plain)
    for ours, theirs in ((x, x2), (w, w2), (b, b2)):
        assert torch.equal(ours.grad, theirs.grad)


@axes.dtypes
@axes.masks
@pytest.mark.parametrize("rows", [33, 1100])
@pytest.mark.parametrize("p", [1, 1.0])
def test_p_1_is_linear_in_the_target(any_case, dtype, mask, rows, p):
    any_case.require(dtype)
    if rows > 1000:
        any_case.skip_if_emulated("too many products")
    problem = budget.random_problem((rows,), 150, 130, dtype=dtype, device=any_case.device, p=p, mask=mask)
    problem.w = torch.full_like(problem.w, float("nan"))
    for schedule in any_case.schedules(dtype):
        results = budget.ours(problem, any_case.backend, schedule=schedule)
        x = problem.x.clone().requires_grad_()
        y = F.linear(x, problem.u, problem.b)
        y.backward(problem.g)
        assert torch.equal(results.dw, torch.zeros_like(problem.w))
        if any_case.emulated or any_case.device != "cpu" or dtype == torch.float16:  # not by F.linear's library
            finite = torch.zeros_like(problem.w)  # NaN times no gradient is NaN in the plain formula
            budget.assert_in_budget(dataclasses.replace(problem, w=finite), results)
        else:
            assert torch.equal(results.y, y)


@axes.masks
def test_p_1_without_a_target_is_the_bias(any_case, mask):
    problem = budget.random_problem((5,), 100, 63, device=any_case.device, p=1.0, mask=mask, target=None)
    results = budget.ours(problem, any_case.backend)
    assert torch.equal(results.y, problem.b.expand(5, 63))
    assert not results.dx.any()
    assert not results.dw.any()


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)], ids=str)
def test_no_features_and_no_rows_train(any_case, shape):
    """Also compiled, where x[:, kept] has a capacity: of no features it is zero, which is not "nothing to keep"."""
    rows, in_features = shape

    def call(x, w):
        return mk.mix_linear(x, w, None, p=0.5, seed=1, backend=any_case.backend)

    functions = [call]
    if not any_case.emulated:
        functions.append(torch.compile(call, backend="aot_eager", fullgraph=True))
    for function in functions:
        x = torch.ones(rows, in_features, device=any_case.device, requires_grad=True)
        w = torch.ones(4, in_features, device=any_case.device, requires_grad=True)
        y = function(x, w)
        y.sum().backward()
        assert not y.any()
        assert x.grad.shape == x.shape
        assert torch.equal(w.grad, torch.zeros_like(w))
