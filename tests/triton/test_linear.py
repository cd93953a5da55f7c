"""y, dx, dw and db of both schedules in the interpreter."""

import itertools

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels import ops
from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import fused_linear, linear

from .. import budget
from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]
MASKS = ["neuron", "weight"]
SCHEDULES = ["fused", "staged"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([77])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", [True, None], ids=["target", "zero"])
def test_within_budget(dtype, mask, schedule, target):
    for shape, p, transposed in (((130, 63, 100), 0.7, False), ((17, 100, 63), 0.5, True), ((1, 1, 1), 1e-9, False)):
        rows, in_features, out_features = shape
        problem = budget.random_problem(
            (rows,), in_features, out_features, dtype=dtype, p=p, mask=mask, target=target, transposed=transposed
        )
        clean = problem.w.clone()
        problem.w.copy_(torch.where(problem.keep, clean, torch.nan))
        results = budget.ours(problem, "triton", schedule=schedule)
        problem.w.copy_(clean)
        budget.assert_in_budget(problem, results)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_kept(mask, schedule):
    for target in (True, None):
        problem = budget.random_problem((5,), 63, 100, p=1.0, mask=mask, target=target)
        results = budget.ours(problem, "triton", schedule=schedule)
        budget.assert_in_budget(problem, results)
        assert not results.dw.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_multiplies_exactly_phi(dtype, mask, schedule, transposed):
    """With x = 1 the result is Phi^T, with g = 1 dx is Phi: the operand inside the product, bit for bit."""
    for out_features, in_features in ((63, 100), (64, 128)):
        w, u = torch.randn(2, out_features, in_features).to(dtype)
        if transposed:
            w = w.t().contiguous().t()
        phi = mk.reference.mixout(w, u, p=0.5, mask=mask, seed=SEED)
        x, g = torch.eye(in_features, dtype=dtype), torch.eye(out_features, dtype=dtype)
        y, kept = backend.mix_linear(x, w, u, None, SEED, 0.5, mask, 0, schedule)
        assert torch.equal(y, phi.t())
        assert kept.shape == (in_features, 0)
        dx, _, _ = backend.mix_linear_backward(
            g, kept if mask == "neuron" else x, w, u, SEED, 0.5, 2.0, mask, (True, False, False), schedule
        )
        assert torch.equal(dx, phi)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("target", "compute"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (None, torch.float16)],
    ids=str,
)
def test_a_float32_weight_in_a_narrower_product(mask, schedule, target, compute):
    """As under autocast: Phi is rounded once, y, dx and db are in the compute dtype, dw in the weight's."""
    problem = budget.random_problem((33,), 100, 63, mask=mask, target=target)
    problem.x, problem.b, problem.g = (t.to(compute) for t in (problem.x, problem.b, problem.g))
    seed, width = torch.tensor([problem.seed]), 64 if mask == "neuron" else 0
    arguments = problem.w, problem.u, problem.b, seed, problem.p, mask, width, schedule
    y, saved = backend.mix_linear(problem.x, *arguments)
    saved = problem.x if mask == "weight" else saved
    dx, dw, db = backend.mix_linear_backward(
        problem.g, saved, problem.w, problem.u, seed, problem.p, problem.scale, mask, (True,) * 3, schedule
    )
    exact, (norm1, norm2) = budget.truth(problem), budget.magnitudes(problem)
    for name, result in (("y", y), ("dx", dx), ("dw", dw), ("db", db)):
        value = getattr(exact, name)
        budget.assert_close(
            result,
            value,
            value,
            norm1=getattr(norm1, name),
            norm2=getattr(norm2, name),
            dtype=torch.float32 if name == "dw" else compute,
            terms=101,
            scale=problem.scale,
            rounding=compute,
            name=name,
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", [True, None], ids=["target", "zero"])
def test_saved_columns(schedule, target):
    """x[:, kept] at a fixed width, and at exactly the kept columns."""
    problem = budget.random_problem((33,), 100, 63, target=target)
    seed, kept = torch.tensor([problem.seed]), problem.keep[0].nonzero()[:, 0]
    for width in (None, len(kept) + 7):
        arguments = problem.x, problem.w, problem.u, problem.b, seed, problem.p, "neuron", width, schedule
        _, saved = backend.mix_linear(*arguments)
        assert torch.equal(saved[:, : len(kept)], problem.x[:, kept])
        assert saved.shape[1] == (width or len(kept))
        assert not saved[:, len(kept) :].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", [True, None], ids=["target", "zero"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_overflow_of_the_capacity(schedule, target, transposed):
    """Columns that do not fit lose their gradient, and no memory but the outputs is touched (``guarded_memory``)."""
    problem = budget.random_problem((33,), 100, 63, target=target, transposed=transposed, bias=False)
    seed, kept = torch.tensor([problem.seed]), problem.keep[0].nonzero()[:, 0]
    width = len(kept) - 5
    arguments = seed, problem.p, "neuron"
    y, saved = backend.mix_linear(problem.x, problem.w, problem.u, None, *arguments, width, schedule)
    dx, dw, db = backend.mix_linear_backward(
        problem.g, saved, problem.w, problem.u, seed, problem.p, problem.scale, "neuron", (True,) * 3, schedule
    )
    assert torch.equal(saved, problem.x[:, kept[:width]])
    exact = budget.truth(problem).dw
    exact[:, kept[width:]] = 0
    assert torch.allclose(dw.double(), exact, rtol=1e-4, atol=1e-4)
    assert not dw[:, kept[width:]].any()
    assert all(result.isfinite().all() for result in (y, dx, db))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_dropped_weight_has_no_gradient_whatever_g_is(mask, schedule):
    problem = budget.random_problem((5,), 63, 100, mask=mask)
    problem.g[2] = torch.inf
    dw = budget.ours(problem, "triton", schedule=schedule).dw
    assert not dw[~problem.keep].any()
    assert not dw[problem.keep].isfinite().any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(0, 63, 100), (5, 0, 100), (5, 63, 0)], ids=str)
def test_nothing_to_multiply(mask, schedule, shape):
    rows, in_features, out_features = shape
    problem = budget.random_problem((rows,), in_features, out_features, mask=mask)
    results = budget.ours(problem, "triton", schedule=schedule)
    budget.assert_in_budget(problem, results)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_the_gradients_that_are_needed(mask, schedule):
    problem = budget.random_problem((5,), 63, 100, mask=mask)
    seed, width = torch.tensor([problem.seed]), ops.column_capacity(63, problem.p) if mask == "neuron" else 0
    _, saved = backend.mix_linear(problem.x, problem.w, problem.u, None, seed, problem.p, mask, width, schedule)
    saved = problem.x if mask == "weight" else saved
    arguments = problem.g, saved, problem.w, problem.u, seed, problem.p, problem.scale, mask
    everything = backend.mix_linear_backward(*arguments, (True,) * 3, schedule)
    for needs in itertools.product((False, True), repeat=3):
        for result, complete, needed in zip(
            backend.mix_linear_backward(*arguments, needs, schedule), everything, needs, strict=True
        ):
            assert result.shape == (complete.shape if needed else (0,))
            assert not needed or torch.allclose(result, complete, rtol=1e-6, atol=1e-6)  # two orders of summation of db


@pytest.mark.parametrize("mask", MASKS)
def test_rows_that_are_not_side_by_side(mask):
    """Inputs and gradients that are slices, transposes or expanded."""
    problem = budget.random_problem((2, 5), 100, 63, mask=mask)
    wide = torch.randn(2, 5, 130)
    wide[..., 7:107] = problem.x
    strided = budget.replace(problem, x=wide[..., 7:107], g=problem.g.transpose(0, 1).contiguous().transpose(0, 1))
    expanded = budget.replace(problem, g=torch.ones(1, 1, 1).expand(problem.g.shape))
    for schedule, variant in itertools.product(SCHEDULES, (strided, expanded)):
        budget.assert_in_budget(variant, budget.ours(variant, "triton", schedule=schedule))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", [*SCHEDULES, "auto"])
def test_phi_that_the_caller_has(mask, schedule):
    """``mixed`` is multiplied as it is, in both directions; dw and x[:, kept] come from the mask all the same."""
    problem = budget.random_problem((5,), 63, 100, mask=mask, bias=False)
    seed, width, mixed = torch.tensor([problem.seed]), 0 if mask == "weight" else 48, torch.randn(100, 63)
    arguments = problem.w, problem.u, None, seed, problem.p, mask, width, schedule
    y, saved = backend.mix_linear(problem.x, *arguments, mixed)
    saved = problem.x if mask == "weight" else saved
    dx, dw, _ = backend.mix_linear_backward(
        problem.g, saved, problem.w, problem.u, seed, problem.p, problem.scale, mask, (True,) * 3, schedule, mixed
    )
    assert torch.equal(y, problem.x @ mixed.t())
    assert torch.equal(dx, problem.g @ mixed)
    assert torch.allclose(dw.double(), budget.truth(problem).dw, rtol=1e-4, atol=1e-4)


def test_automatic_schedule():
    """Few rows are fused, many staged; float32 without tf32 is staged, whatever the rows."""
    few, many = torch.zeros(16, 4), torch.zeros(4096, 4)
    assert linear._schedule(few.bfloat16(), "auto") == "fused"
    assert linear._schedule(many.bfloat16(), "auto") == "staged"
    assert linear._schedule(few, "auto") == "staged"
    assert linear._schedule(few, "fused") == linear._schedule(many, "fused") == "fused"


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
def test_tiles_fit_in_shared_memory(shared):
    """All that is under way, and Phi on its way to the operand, on every size of shared memory from sm_80 to sm_100."""
    two, four = torch.bfloat16, torch.float32
    for compute, precision, weight in ((two, "", two), (two, "", four), (four, "tf32", four), (four, "ieee", four)):
        for rows, forward, aligned in itertools.product((1, 64, 65), (True, False), (True, False)):
            tile = fused_linear.tile_for(rows, forward, weight, precision, aligned, shared)
            stages = fused_linear.stages_for(tile, 2 * weight.itemsize, compute, shared)
            operands = tile.rows * compute.itemsize + 2 * tile.outputs * weight.itemsize
            assert tile.reduced * (stages * operands + tile.outputs * compute.itemsize) <= shared
