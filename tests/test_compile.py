"""torch.compile(fullgraph=True): the bits of eager, one graph for every seed and batch size, fresh masks per call."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config

import mixout_kernels as mk
from mixout_kernels import draws

from . import axes, budget


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """The function compiled to one graph, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def layer(problem, case, schedule=None):
    def call(x, w, b, seed):
        return mk.mix_linear(
            x, w, problem.u, b, p=problem.p, mask=problem.mask, seed=seed, backend=case.backend, schedule=schedule
        )

    return call


def results(call, problem, seed):
    x, w, b = budget.leaves(problem)
    y = call(x, w, b, torch.tensor([seed], dtype=torch.int64, device=problem.w.device))
    y.backward(problem.g)
    return budget.Results(y.detach(), x.grad, w.grad, None if b is None else b.grad)


def assert_same(first, second):
    for name in budget.RESULTS:
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None and b is None) or torch.equal(a, b), name


@axes.masks
@axes.targets
def test_equals_eager_bit_for_bit(case, mask, target):
    problem = budget.random_problem((16,), 100, 63, device=case.device, mask=mask, target=target)
    for schedule in case.schedules():
        torch._dynamo.reset()
        eager = layer(problem, case, schedule)
        call, counter = compiled(eager)
        for seed in (1, -(2**62)):
            assert_same(results(call, problem, seed), results(eager, problem, seed))
        assert counter.frame_count == 1


@axes.masks
def test_inductor_equals_eager_bit_for_bit(case, mask):
    problem = budget.random_problem((16,), 100, 63, device=case.device, mask=mask)
    eager = layer(problem, case)
    call, counter = compiled(eager, "inductor")
    for seed in (1, 2):
        assert_same(results(call, problem, seed), results(eager, problem, seed))
    assert counter.frame_count == 1


@axes.masks
def test_no_recompilation_for_a_new_seed_or_batch_size(case, mask):
    eager = layer(budget.random_problem((8,), 100, 63, device=case.device, mask=mask), case)
    call, counter = compiled(eager)
    counts = []
    for seed, rows in enumerate([8, 8, 16, 24, 40, 3, 1100]):
        problem = budget.random_problem((rows,), 100, 63, device=case.device, mask=mask)
        assert_same(results(call, problem, seed), results(eager, problem, seed))
        counts.append(counter.frame_count)
    # Dynamo specialises on the first size and makes it dynamic at the second; from there on nothing is compiled.
    assert counts == [1, 1, 2, 2, 2, 2, 2]


def test_no_recompilation_with_a_dynamic_batch(case):
    eager = layer(budget.random_problem((8,), 100, 63, device=case.device), case)
    call, counter = compiled(eager)
    for seed, rows in enumerate([(2, 4), (3, 5), (4, 9), (7, 7)]):
        problem = budget.random_problem(rows, 100, 63, device=case.device)
        torch._dynamo.mark_dynamic(problem.x, 0)
        torch._dynamo.mark_dynamic(problem.x, 1)
        x = problem.x
        seed = torch.tensor([seed], dtype=torch.int64, device=case.device)
        assert torch.equal(call(x, problem.w, problem.b, seed), eager(x, problem.w, problem.b, seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@axes.masks
def test_module_draws_a_fresh_mask_for_each_call(device, mask, backend):
    linear = nn.Linear(100, 63).to(device)
    module = mk.MixLinear.from_linear(linear, p=0.5, target=torch.zeros_like(linear.weight), mask=mask)
    x = torch.randn(8, 100, device=device)
    call, counter = compiled(module, backend)
    torch.manual_seed(4)
    first, second = call(x), call(x)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(call(x), first)
    assert torch.equal(call(x), second)
    assert counter.frame_count == 1
    module.eval()
    assert torch.equal(call(x), linear(x))


def test_model_trains_as_in_eager(device):
    """Two layers, a whole step: the masks of a compiled step are drawn in the order of the eager one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20)).to(device)
    mk.apply_mixout(model, p=0.5)
    x = torch.randn(8, 20, device=device)

    def gradients(call):
        model.zero_grad()
        torch.manual_seed(6)
        call(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    call, _ = compiled(model)
    for ours, eager in zip(gradients(call), gradients(model), strict=True):
        assert torch.equal(ours, eager)


@axes.masks
def test_mixout(case, mask):
    w, u = torch.randn(2, 30, 20, device=case.device)

    def eager(w, seed):
        return mk.mixout(w, u, p=0.5, mask=mask, seed=seed, backend=case.backend)

    call, counter = compiled(eager)
    for seed in (1, 2, 3):
        seed = torch.tensor([seed], dtype=torch.int64, device=case.device)
        leaves = [w.clone().requires_grad_() for _ in range(2)]
        ours, expected = call(leaves[0], seed), eager(leaves[1], seed)
        ours.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(ours, expected)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 1


def test_under_autocast(case):
    problem = budget.random_problem((16,), 100, 63, device=case.device)
    problem.g = problem.g.bfloat16()
    plain = layer(problem, case)

    def eager(*arguments):
        with torch.autocast(case.device, torch.bfloat16):
            return plain(*arguments)

    call, _ = compiled(eager)
    found, expected = results(call, problem, 3), results(eager, problem, 3)
    if case.backend == "cuda":
        # Recorded in C++ the layer rounds the gradient of its bias once, to the bias's dtype. In compiled code, as in
        # F.linear, autocast has cast the bias before the operator, so that it is rounded to bfloat16 first.
        expected = dataclasses.replace(expected, db=expected.db.bfloat16().float())
    assert_same(found, expected)


@axes.masks
def test_reference(device, mask):
    problem = budget.random_problem((16,), 100, 63, device=device, mask=mask)

    def eager(x, w, b, seed):
        return mk.mix_linear(x, w, problem.u, b, p=0.7, mask=mask, seed=seed, backend="reference")

    call, counter = compiled(eager)
    for seed in (1, 2):
        assert_same(results(call, problem, seed), results(eager, problem, seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mask", draws.KINDS)
@pytest.mark.parametrize("budget_of_memory", [0.5, 0.05])
def test_recomputed_activations_have_the_mask_of_forward(device, backend, mask, budget_of_memory):
    """The partitioner recomputes what it is not given memory for, and must not draw another seed while it does.

    x is the identity and w is one, so that y and dw both show the mask.
    """
    first = mk.MixLinear(32, 32, bias=False, p=0.5, mask=mask, device=device)
    second = mk.MixLinear(32, 32, bias=False, p=0.5, mask=mask, device=device)
    nn.init.ones_(first.weight)

    def model(x):
        y = first(x)
        return y, second(torch.nn.functional.gelu(torch.nn.functional.gelu(y)))

    function = torch.compile(model, backend=backend, fullgraph=True)
    with functorch_config.patch(activation_memory_budget=budget_of_memory):
        for _ in range(8):  # half of the masks of a layer as a whole drop nothing
            first.weight.grad = None
            y, z = function(torch.eye(32, device=device))
            (y.sum() + z.square().sum()).backward()
            assert torch.equal(first.weight.grad != 0, (y != 0).t())


def test_a_budget_of_zero_is_an_error(device):
    """torch then recomputes random numbers without their state, those of its own dropout too."""
    layer = torch.compile(mk.MixLinear(8, 8, p=0.5, device=device), backend="aot_eager", fullgraph=True)
    expected = pytest.raises(Exception, match="activation_memory_budget: expected a budget above 0, got 0")
    with functorch_config.patch(activation_memory_budget=0), expected:
        layer(torch.ones(2, 8, device=device))
