"""The registered operators against torch's own checks: schema, fake tensors, autograd registration, tracing."""

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels import draws, ops

from . import axes, budget


def check(operator, arguments):
    torch.library.opcheck(operator, arguments)


def settings_of(case, problem, width):
    strides = draws.strides_of(problem.mask, problem.w.shape)
    return ops.Settings(problem.p, strides, 0, *draws.GradientMask.of(problem.p), width, case.backend, "auto")


def linear_arguments(case, problem, width, *, operand=None, kept_input=None):
    x, w, b = budget.leaves(problem)
    seed = torch.tensor([problem.seed], dtype=torch.int64, device=case.device)
    return x, w, problem.u, b, operand, kept_input, seed, *settings_of(case, problem, width)


@axes.masks
@axes.targets
@pytest.mark.parametrize("shape", [(7,), (5, 7)], ids=str)
def test_mixout(case, mask, target, shape):
    w, u = torch.randn(2, *shape, device=case.device)
    seed = torch.tensor([3], dtype=torch.int64, device=case.device)
    strides = draws.strides_of(mask, shape)
    arguments = (w.requires_grad_(), u if target else None, seed, 0.5, strides, 0, 2.0, 0.5, 2.0, case.backend)
    check(ops.mixout_op, arguments)


@pytest.mark.parametrize(
    ("mask", "width"),
    [("weight", 0), ("output", 0), ("layer", 0), ("neuron", 16), ("neuron", 40), ("neuron", None)],
    ids=str,
)
@axes.targets
def test_mix_linear(case, mask, width, target):
    if width is None and case.device != "cpu":
        pytest.skip("exactly the kept columns are saved on the CPU only: their number is in the seed's value")
    problem = budget.random_problem((2, 3), 40, 6, device=case.device, p=0.75, mask=mask, target=target)
    check(ops.mix_linear_op, linear_arguments(case, problem, width))


@axes.masks
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_mix_linear_without_a_gradient_of_the_weight(case, mask, bias):
    problem = budget.random_problem((2, 3), 40, 6, device=case.device, p=0.75, mask=mask, bias=bias)
    arguments = linear_arguments(case, problem, 0)
    arguments[1].requires_grad_(False)
    check(ops.mix_linear_op, arguments)


@axes.masks
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]], ids=str)
@axes.transposed
def test_mix_linear_backward(case, mask, needs, transposed):
    problem = budget.random_problem((2, 3), 40, 6, device=case.device, p=0.75, mask=mask, transposed=transposed)
    width = 32 if mask == "neuron" else 0
    x, w, u, _, _, _, seed, *settings = linear_arguments(case, problem, width)
    saved = ops.mix_linear_op(*linear_arguments(case, problem, width))[1] if width else x
    check(ops.mix_linear_backward_op, (problem.g, saved.detach(), w.detach(), u, None, seed, *settings, needs))


@axes.masks
def test_what_a_sampler_hands_in(case, mask):
    """A mixed weight, and the kept columns of a sibling's input: the same bits as without, and traceable."""
    problem = budget.random_problem((6,), 40, 8, device=case.device, p=0.75, mask=mask, integers=True)
    expected = budget.ours(problem, case.backend)
    phi = mk.mixout(problem.w, problem.u, p=problem.p, mask=mask, seed=problem.seed, backend=case.backend)
    capacity = 32 if mask == "neuron" else 0
    kept = ops.mix_linear_op(*linear_arguments(case, problem, capacity))[1].detach() if capacity else None
    handed_in = {"operand": phi, "kept_input": kept}
    arguments = linear_arguments(case, problem, capacity, **handed_in)
    y, saved = ops.mix_linear_op(*arguments)
    y.backward(problem.g)
    assert saved.numel() == 0
    assert torch.equal(y, expected.y)
    for leaf, name in ((0, "dx"), (1, "dw"), (3, "db")):
        assert torch.equal(arguments[leaf].grad, getattr(expected, name)), name
    check(ops.mix_linear_op, linear_arguments(case, problem, capacity, **handed_in))


@axes.masks
@axes.targets
def test_the_operator_equals_the_function(case, mask, target):
    """The public function goes past the dispatcher; the registered operator is what a compiled graph runs."""
    problem = budget.random_problem((6,), 40, 6, device=case.device, p=0.75, mask=mask, target=target, integers=True)
    expected = budget.ours(problem, case.backend)
    arguments = linear_arguments(case, problem, draws.column_capacity(40, 0.75) if mask == "neuron" else 0)
    y = ops.mix_linear_op(*arguments)[0]
    y.backward(problem.g)
    assert torch.equal(y, expected.y)
    for leaf, name in ((0, "dx"), (1, "dw"), (3, "db")):
        assert torch.equal(arguments[leaf].grad, getattr(expected, name)), name


def test_width_are_the_kept_ones(case):
    problem = budget.random_problem((2, 3), 40, 6, device=case.device, p=0.75)
    kept = problem.x.reshape(6, 40)[:, problem.keep[0]]
    for capacity in (40, 32, None):
        if capacity is None and case.device != "cpu":
            continue
        saved = ops.mix_linear_op(*linear_arguments(case, problem, capacity))[1]
        assert saved.shape == (6, kept.shape[1] if capacity is None else capacity)
        assert torch.equal(saved[:, : kept.shape[1]], kept)
        assert not saved[:, kept.shape[1] :].any()


@axes.targets
def test_a_draw_beyond_the_capacity_is_memory_safe(case, target):
    """Its probability is < 2e-12 for column_capacity; forced here. y, dx, db are whole, dw loses what did not fit."""
    problem = budget.random_problem((6,), 40, 6, device=case.device, p=0.5, target=target, integers=True)
    expected = budget.ours(problem, case.backend)
    kept = problem.keep[0].nonzero().flatten()
    assert len(kept) > 16
    arguments = linear_arguments(case, problem, 16)
    y, saved = ops.mix_linear_op(*arguments)
    y.backward(problem.g)
    assert saved.shape == (6, 16)
    assert torch.equal(y, expected.y)
    assert torch.equal(arguments[0].grad, expected.dx)
    assert torch.equal(arguments[3].grad, expected.db)
    lost = kept[16:]
    expected.dw[:, lost] = 0
    assert torch.equal(arguments[1].grad, expected.dw)


@pytest.mark.parametrize("in_features", [1, 15, 16, 17, 384, 768, 4096])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.7, 0.9, 0.999])
def test_capacity_is_seven_standard_deviations(in_features, p):
    mean, sigma = in_features * (1 - p), (in_features * p * (1 - p)) ** 0.5
    capacity = draws.column_capacity(in_features, p)
    assert capacity == in_features or (capacity >= mean + 7 * sigma and capacity % 16 == 0)
    assert capacity < mean + 7 * sigma + 16


def test_a_gradient_that_was_not_prepared_for_is_an_error(case):
    problem = budget.random_problem((2, 3), 40, 6, device=case.device, p=0.75)
    with pytest.raises(RuntimeError, match="weight requires grad, but width=0"):
        ops.mix_linear_op(*linear_arguments(case, problem, 0))
