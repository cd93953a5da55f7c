"""y, dx, dw and db within the error budget, and what the schedules, splits and stages may not change."""

from __future__ import annotations

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels.backends import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw, strides_of

from .. import axes, budget


def assert_in_budget(problem, schedule, **options):
    budget.assert_in_budget(problem, budget.ours(problem, "cuda", schedule=schedule, **options))


@axes.gpu_dtypes
@axes.masks
@axes.targets
@pytest.mark.parametrize("p", [1e-9, 0.5, 0.9, 1.0])
@axes.schedules
def test_probabilities(device, dtype, mask, target, p, schedule):
    problem = budget.random_problem((33,), 100, 63, dtype=dtype, device=device, p=p, mask=mask, target=target)
    assert_in_budget(problem, schedule)


@axes.masks
@axes.transposed
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (63, 130, 100), (64, 1100, 136), (100, 128, 1160), (130, 200, 130), (260, 72, 64)], ids=str
)
@axes.wide_and_narrow
def test_shapes(device, mask, transposed, shape, dtype):
    rows, in_features, out_features = shape
    for bias in (True, False):
        problem = budget.random_problem(
            (rows,), in_features, out_features, dtype=dtype, device=device, mask=mask, transposed=transposed, bias=bias
        )  # fmt: skip
        assert_in_budget(problem, "fused")


@axes.wide_and_narrow
@axes.masks
@pytest.mark.parametrize("p", [0.0, 0.3])
@axes.schedules
def test_gradients_dropped_alone(device, dtype, mask, p, schedule):
    """A second threshold for the gradient; at p = 0 the operand is w itself."""
    problem = budget.random_problem((33,), 100, 63, dtype=dtype, device=device, p=p, grad_p=0.6, mask=mask)
    assert_in_budget(problem, schedule)


@pytest.mark.parametrize("rows", [(), (2, 3, 4), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("schedule", [None, "fused", "staged"])
@axes.masks
def test_input_dimensions(device, rows, schedule, mask):
    problem = budget.random_problem(rows, 72, 64, dtype=torch.bfloat16, device=device, mask=mask)
    assert_in_budget(problem, schedule)


@axes.schedules
@axes.half
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, None], ids=str)
@axes.transposed
def test_float32_weight_in_half_precision(device, schedule, compute, target, transposed):
    """What autocast asks for: dw comes back in float32, rounded no more than the product is."""
    problem = budget.random_problem((33,), 136, 72, device=device, target=target, transposed=transposed)
    problem.x, problem.g, problem.b = (t.to(compute) for t in (problem.x, problem.g, problem.b))
    with torch.autocast(device, compute):
        results = budget.ours(problem, "cuda", schedule=schedule)
    assert results.dw.dtype == torch.float32
    exact, (norm1, norm2) = budget.truth(problem), budget.magnitudes(problem)
    phi = budget.plain_mixout(problem.w, None if problem.u is None else problem.u.float(), problem.keep, problem.scale)
    x, g, phi = problem.x, problem.g, phi.to(compute)
    in_torch = {"y": x @ phi.t() + problem.b, "dx": g @ phi, "dw": problem.keep * problem.scale * (g.t() @ x).float()}
    for name, terms in (("y", 137), ("dx", 72), ("dw", 33)):
        budget.assert_close(
            getattr(results, name),
            getattr(exact, name),
            in_torch[name],
            norm1=getattr(norm1, name),
            norm2=getattr(norm2, name),
            dtype=torch.float32 if name == "dw" else compute,
            terms=terms,
            scale=problem.scale,
            rounding=compute,
            name=name,
        )


def product(kernels, problem, backward):
    seed = torch.tensor([problem.seed], device=problem.x.device)
    draw = Draw(seed, problem.p, strides_of(problem.mask, problem.w.shape))
    if backward:
        return kernels.primitives.fused_input_gradient(problem.g, problem.w, problem.u, draw)
    return kernels.primitives.fused_linear(problem.x, problem.w, problem.u, None, draw, draw, 0)[0]


@axes.masks
@pytest.mark.parametrize("backward", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize("features", [(1030, 1100), (1032, 1096)], ids=["copied by elements", "asynchronous copies"])
def test_splits(kernels, device, monkeypatch, mask, backward, features):
    """However many blocks share a contraction the result is in the budget, and it is the same in every run."""
    problem = budget.random_problem((40,), *features, dtype=torch.bfloat16, device=device, mask=mask)
    plans = []
    types = [kernels.primitives.TYPES[torch.bfloat16]] * 2
    for multiprocessors in (1, 20, 1000):
        monkeypatch.setattr(kernels.primitives, "_multiprocessors", lambda count=multiprocessors: count)
        result = product(kernels, problem, backward)
        name = "dx" if backward else "y"
        exact, (norm1, norm2) = budget.truth(problem), budget.magnitudes(problem)
        without_bias = problem.b.double() if name == "y" else 0
        in_torch = problem.g @ phi(problem) if backward else problem.x @ phi(problem).t()
        budget.assert_close(
            result,
            getattr(exact, name) - without_bias,
            in_torch,
            norm1=getattr(norm1, name),
            norm2=getattr(norm2, name),
            dtype=torch.bfloat16,
            terms=1100,
            name=name,
        )
        assert torch.equal(result, product(kernels, problem, backward))
        plans.append(kernels.primitives._loaded.plan_product(40, *features, *types, multiprocessors).splits)
    assert plans[0] == 1 < plans[1] < plans[2]


def phi(problem):
    u = problem.u.float()
    return budget.plain_mixout(problem.w.float(), u, problem.keep, problem.scale).to(problem.w.dtype)


@axes.masks
@pytest.mark.parametrize("backward", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize(("rows", "dtype"), [(40, torch.bfloat16), (70, torch.bfloat16), (40, torch.float32)], ids=str)
def test_order_of_threads_and_number_of_stages(kernels, device, mask, backward, rows, dtype):
    """A missing barrier, or a stage that is filled too early, shows as another result in another order."""
    if device != "cpu":
        pytest.skip(
            "orders and shared memory are chosen in emulation; compute-sanitizer's racecheck does this on a GPU"
        )
    problem = budget.random_problem((rows,), 1032, 1096, dtype=dtype, mask=mask)
    results = []
    for order, kilobytes in (("ascending", 99), ("descending", 163), ("random", 227), ("random", 99)):
        kernels.primitives._loaded.emulate(order, seed=len(results), shared_bytes=kilobytes * 1024)
        results.append(product(kernels, problem, backward))
    assert all(torch.equal(result, results[0]) for result in results)


def test_auto_takes_the_staged_schedule_for_odd_rows_of_memory(kernels, monkeypatch, device):
    """Their copies are element by element, not asynchronous."""
    chosen = []
    monkeypatch.setattr(kernels.primitives, "_mix_product", lambda x, *_: chosen.append("fused") or x.new_empty(8, 64))
    for in_features, expected in ((72, ["fused"]), (63, [])):
        x, w = (torch.randn(n, in_features, device=device).bfloat16() for n in (8, 64))
        draw = Draw(torch.tensor([1], device=device), 0.5, strides_of("neuron", w.shape))
        kernels.mix_linear(x, MixedWeight(w, None, None, draw), None, WeightGradient(draw, draw.scale, 0), "auto")
        assert chosen == expected
        chosen.clear()


def test_what_cannot_be_done_is_said(kernels, device):
    x = torch.randn(4, 8, device=device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the cuda backend takes float32, bfloat16 and float16 weights"):
        mk.mix_linear(x, x, None, p=0.5, backend="cuda")
    assert "bfloat16 for float32" in kernels.unsupported_reason(device, torch.float32, torch.float16, torch.float32)
    assert "casts float32 down" in kernels.unsupported_reason(device, torch.bfloat16, torch.bfloat16, torch.float32)
    assert "takes tensors on" in kernels.unsupported_reason("meta", *[torch.float32] * 3)
