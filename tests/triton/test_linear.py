"""y, dx, dw and db of both schedules in the interpreter."""

import itertools

import pytest
import torch

from mixout_kernels import reference
from mixout_kernels.backends import MixedWeight, WeightGradient
from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import fused_linear, primitives
from mixout_kernels.draws import Draw, GradientMask, column_capacity, strides_of

from .. import axes, budget
from ..placements import PLACEMENTS, SHAPES, draw_at
from .conftest import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("guarded_memory")]
ALL = (True, True, True)


class Layer:
    """The problem as the backend takes it: the records, and the four results. ``width`` as in ``WeightGradient``."""

    def __init__(self, problem, width=None, operand=None):
        self.problem = problem
        draw = Draw(torch.tensor([problem.seed]), problem.p, strides_of(problem.mask, problem.w.shape))
        gradient = GradientMask.of(problem.p, problem.grad_p, rescale=problem.rescale)
        self.phi = MixedWeight(problem.w, problem.u, operand, draw)
        self.by_column = draw.by_column
        self.gradient = WeightGradient(draw.at(gradient.q), gradient.scale, width if self.by_column else 0)

    def forward(self, schedule):
        """y, and what backward reads of x."""
        y, kept = backend.mix_linear(self.problem.x, self.phi, self.problem.b, self.gradient, schedule)
        return y, kept if self.by_column else self.problem.x

    def backward(self, saved, schedule, needs=ALL):
        return backend.mix_linear_backward(self.problem.g, saved, self.phi, self.gradient, needs, schedule)


@axes.gpu_dtypes
@axes.masks
@axes.schedules
@axes.targets
@pytest.mark.parametrize("grad_p", [0.0, 0.4])
def test_within_budget(dtype, mask, schedule, target, grad_p):
    for shape, p, transposed in (((130, 63, 100), 0.7, False), ((17, 100, 63), 0.5, True), ((1, 1, 1), 1e-9, False)):
        rows, in_features, out_features = shape
        problem = budget.random_problem(
            (rows,), in_features, out_features, dtype=dtype, p=p, mask=mask, target=target, transposed=transposed
        )
        problem.grad_p = grad_p
        clean = problem.w.clone()
        problem.w.copy_(torch.where(problem.keep, clean, torch.nan))
        results = budget.ours(problem, "triton", schedule=schedule)
        problem.w.copy_(clean)
        budget.assert_in_budget(problem, results)


@axes.gpu_dtypes
@pytest.mark.parametrize("placement", PLACEMENTS)
@axes.schedules
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed weight"])
def test_multiplies_exactly_phi(dtype, placement, schedule, transposed):
    """With x = 1 the result is Phi^T, with g = 1 dx is Phi: the operand inside the GEMM, bit for bit."""
    for out_features, in_features in SHAPES:
        w, u = torch.randn(2, out_features, in_features).to(dtype)
        if transposed:
            w = w.t().contiguous().t()
        draw = draw_at(placement, (out_features, in_features))
        expected = reference.mixed_weight(w, u, None, draw, GradientMask.of(draw.p), dtype)
        x, g = torch.eye(in_features, dtype=dtype), torch.eye(out_features, dtype=dtype)
        phi, gradient = MixedWeight(w, u, None, draw), WeightGradient(draw, draw.scale, 0)
        y, kept = backend.mix_linear(x, phi, None, gradient, schedule)
        assert torch.equal(y, expected.t())
        assert kept.shape == (in_features, 0)
        dx, _, _ = backend.mix_linear_backward(g, kept, phi, gradient, (True, False, False), schedule)
        assert torch.equal(dx, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@axes.schedules
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed weight"])
def test_the_gradient_has_a_threshold_of_its_own(placement, schedule, transposed):
    """dw = scale * M_q * (g^T x), exactly for small integers, from the words that mixed with p."""
    for out_features, in_features in SHAPES:
        x, g = torch.randint(-2, 3, (33, in_features)).float(), torch.randint(-2, 3, (33, out_features)).float()
        w = torch.randn(in_features, out_features).t() if transposed else torch.randn(out_features, in_features)
        draw = draw_at(placement, w.shape, p=0.25)
        keep = reference.decisions(draw.at(0.75), w.shape)
        width = int(keep.sum()) if draw.by_column else 0
        phi, gradient = MixedWeight(w, None, None, draw), WeightGradient(draw.at(0.75), 4.0, width)
        _, kept = backend.mix_linear(x, phi, None, gradient, schedule)
        if draw.by_column:
            assert torch.equal(kept, x[:, keep[0]])
        saved = kept if draw.by_column else x
        _, dw, db = backend.mix_linear_backward(g, saved, phi, gradient, (False, True, True), schedule)
        assert torch.equal(dw, torch.where(keep, 4.0 * (g.t() @ x), 0.0))
        assert dw.stride() == w.stride()
        assert torch.equal(db, g.sum(0))


@axes.masks
@axes.schedules
@pytest.mark.parametrize(
    ("target", "compute"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (None, torch.float16)],
    ids=str,
)
def test_a_float32_weight_in_a_narrower_product(mask, schedule, target, compute):
    """As under autocast: Phi is rounded once, y, dx and db are in the compute dtype, dw in the weight's."""
    problem = budget.random_problem((33,), 100, 63, mask=mask, target=target)
    problem.x, problem.b, problem.g = (t.to(compute) for t in (problem.x, problem.b, problem.g))
    layer = Layer(problem, width=64)
    y, saved = layer.forward(schedule)
    dx, dw, db = layer.backward(saved, schedule)
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


@axes.schedules
@axes.targets
@pytest.mark.parametrize("grad_p", [0.0, 0.4])
def test_saved_columns(schedule, target, grad_p):
    """x[:, kept] at a fixed width, and at exactly the kept columns."""
    problem = budget.random_problem((33,), 100, 63, target=target)
    problem.grad_p = grad_p
    kept = problem.keep_gradient[0].nonzero()[:, 0]
    for width in (None, len(kept) + 7):
        _, saved = Layer(problem, width).forward(schedule)
        assert torch.equal(saved[:, : len(kept)], problem.x[:, kept])
        assert saved.shape[1] == (width or len(kept))
        assert not saved[:, len(kept) :].any()


@axes.schedules
@axes.targets
@axes.transposed
def test_overflow_of_the_capacity(schedule, target, transposed):
    """Columns that do not fit lose their gradient, and no memory but the outputs is touched (``guarded_memory``)."""
    problem = budget.random_problem((33,), 100, 63, target=target, transposed=transposed, bias=False)
    kept = problem.keep[0].nonzero()[:, 0]
    width = len(kept) - 5
    layer = Layer(problem, width)
    y, saved = layer.forward(schedule)
    dx, dw, db = layer.backward(saved, schedule)
    assert torch.equal(saved, problem.x[:, kept[:width]])
    exact = budget.truth(problem).dw
    exact[:, kept[width:]] = 0
    assert torch.allclose(dw.double(), exact, rtol=1e-4, atol=1e-4)
    assert not dw[:, kept[width:]].any()
    assert all(result.isfinite().all() for result in (y, dx, db))


@axes.masks
@axes.schedules
def test_a_dropped_weight_has_no_gradient_whatever_g_is(mask, schedule):
    problem = budget.random_problem((5,), 63, 100, p=0.5, mask=mask)
    problem.g[2] = torch.inf
    dw = budget.ours(problem, "triton", schedule=schedule).dw
    assert not dw[~problem.keep].any()
    assert not dw[problem.keep].isfinite().any()


@axes.masks
@axes.schedules
def test_only_the_gradients_that_are_needed(mask, schedule):
    problem = budget.random_problem((5,), 63, 100, mask=mask)
    layer = Layer(problem, width=column_capacity(63, problem.p))
    _, saved = layer.forward(schedule)
    everything = layer.backward(saved, schedule)
    for needs in itertools.product((False, True), repeat=3):
        for result, complete, needed in zip(layer.backward(saved, schedule, needs), everything, needs, strict=True):
            assert result.shape == (complete.shape if needed else (0,))
            assert not needed or torch.allclose(result, complete, rtol=1e-6, atol=1e-6)  # two orders of summation of db


@axes.masks
def test_rows_that_are_not_side_by_side(mask):
    """Inputs and gradients that are slices, transposes or expanded."""
    problem = budget.random_problem((2, 5), 100, 63, mask=mask)
    wide = torch.randn(2, 5, 130)
    wide[..., 7:107] = problem.x
    strided = budget.replace(problem, x=wide[..., 7:107], g=problem.g.transpose(0, 1).contiguous().transpose(0, 1))
    expanded = budget.replace(problem, g=torch.ones(1, 1, 1).expand(problem.g.shape))
    for schedule, variant in itertools.product(axes.SCHEDULES, (strided, expanded)):
        budget.assert_in_budget(variant, budget.ours(variant, "triton", schedule=schedule))


@axes.masks
@pytest.mark.parametrize("schedule", [*axes.SCHEDULES, "auto"])
def test_an_operand_made_ahead_is_what_is_multiplied(mask, schedule):
    """In both directions; dw and x[:, kept] come from the draw all the same."""
    problem = budget.random_problem((5,), 63, 100, mask=mask, bias=False)
    operand = torch.randn(100, 63)
    layer = Layer(problem, width=48, operand=operand)
    y, saved = layer.forward(schedule)
    dx, dw, _ = layer.backward(saved, schedule)
    assert torch.equal(y, problem.x @ operand.t())
    assert torch.equal(dx, problem.g @ operand)
    assert torch.allclose(dw.double(), budget.truth(problem).dw, rtol=1e-4, atol=1e-4)


def test_automatic_schedule():
    """Few rows are fused, many staged; float32 without tf32 is staged, whatever the rows."""
    few, many = torch.zeros(16, 4), torch.zeros(4096, 4)
    assert primitives.prefers_fused(few.bfloat16(), few, None)
    assert not primitives.prefers_fused(many.bfloat16(), few, None)
    assert not primitives.prefers_fused(few, few, None)


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
def test_tiles_fit_in_shared_memory(shared):
    """All that is under way, and Phi on its way to the operand, on every size of shared memory from sm_80 to sm_100."""
    two, four = torch.bfloat16, torch.float32
    for compute, precision, weight in ((two, "", two), (two, "", four), (four, "tf32", four), (four, "ieee", four)):
        for rows, forward, regular in itertools.product((1, 64, 65), (True, False), (True, False)):
            tile = fused_linear.tile_for(rows, forward, weight, precision, regular, shared)
            stages = fused_linear.stages_for(tile, 2 * weight.itemsize, compute, shared)
            operands = tile.rows * compute.itemsize + 2 * tile.outputs * weight.itemsize
            assert tile.reduced * (stages * operands + tile.outputs * compute.itemsize) <= shared
