"""set_float32_matmul_precision("medium") on a CPU: our float32 products round where F.linear rounds, and only there.

oneDNN rounds with AMX alone. Elsewhere the rounding product is run by telling the backend that there is AMX: by
vdpbf16ps, which multiplies the same operands.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk
from mixout_kernels.backends import cpu
from mixout_kernels.backends.contract import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw, strides_of

from . import axes, budget

pytestmark = [
    pytest.mark.skipif(cpu._BF16_UNIT == "none", reason="NO AVX512_BF16 HERE: nothing rounds float32"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture
def with_amx(monkeypatch):
    monkeypatch.setattr(cpu, "_BF16_UNIT", "tiles")


@contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rounded(t):
    return t.bfloat16().double()


def of_rounded_operands(problem):
    """y, dx and dw of operands that were rounded once each; the mix is in float32, and so are the sums."""
    mixed = budget.plain_mixout(problem.w, problem.u, problem.keep, problem.scale)
    phi, x, g = rounded(mixed), rounded(problem.x), rounded(problem.g)
    y, dx = x @ phi.t() + problem.b.double(), g @ phi
    return y, dx, torch.where(problem.keep_gradient, problem.gradient_scale * (g.t() @ x), 0.0)


def assert_rounded(problem, results):
    mixed = budget.plain_mixout(problem.w, problem.u, problem.keep, problem.scale)
    operands = replace(problem, x=rounded(problem.x), g=rounded(problem.g), w=rounded(mixed), u=None, p=0.0)
    norm1, norm2 = budget.magnitudes(replace(operands, mask="layer"))
    scaled = torch.where(problem.keep_gradient, problem.gradient_scale, 0.0)
    terms = {"y": problem.w.shape[1] + 1, "dx": problem.w.shape[0], "dw": problem.x.shape[0]}
    for (name, count), exact in zip(terms.items(), of_rounded_operands(problem), strict=True):
        factor = scaled if name == "dw" else 1.0
        budget.assert_close(
            getattr(results, name),
            exact,
            exact,  # no error of torch's own is allowed for
            norm1=getattr(norm1, name) * factor,
            norm2=getattr(norm2, name) * factor,
            dtype=torch.float32,
            terms=count,
            scale=problem.gradient_scale,
            name=name,
        )
    budget.assert_close(
        results.db, problem.g.double().sum(0), problem.g.sum(0), norm1=norm1.db, norm2=0, dtype=torch.float32, name="db"
    )


@axes.masks
@axes.transposed
@axes.targets
@pytest.mark.parametrize("shape", [(33, 100, 63), (17, 1000, 47), (300, 47, 130)], ids=str)
def test_operands_are_rounded_once_and_sums_are_float32(with_amx, mask, transposed, target, shape):
    rows, in_features, out_features = shape
    problem = budget.random_problem((rows,), in_features, out_features, mask=mask, transposed=transposed, target=target)
    with precision("medium"):
        results = budget.ours(problem, "cpu", schedule="fused")
    assert_rounded(problem, results)


@axes.masks
@axes.transposed
def test_an_operand_is_rounded_as_it_is_packed(with_amx, mask, transposed):
    """GradDrop, and Phi that a sampler has made in float32, whatever was set then: the same bits as mixing here."""
    problem = budget.random_problem((33,), 100, 63, mask=mask, transposed=transposed)
    draw = Draw(torch.tensor([problem.seed]), problem.p, strides_of(mask, problem.w.shape))
    gradient = WeightGradient(draw, draw.scale, None)
    phi = torch.empty_like(problem.w)
    cpu.mixout_list([phi], [problem.w], [problem.u], [draw])
    results = []
    for operand in (None, phi):
        mixed = MixedWeight(problem.w, problem.u, operand, draw)
        with precision("medium"):
            y, kept = cpu.mix_linear(problem.x, mixed, problem.b, gradient, "fused")
            saved = kept if draw.by_column else problem.x
            back = cpu.mix_linear_backward(problem.g, saved, mixed, gradient, (True, True, True), "fused")
        results.append(budget.Results(y, *back))
        assert_rounded(problem, results[-1])
    for name in budget.RESULTS:
        assert torch.equal(*(getattr(found, name) for found in results)), name


@axes.masks
def test_forward_and_backward_each_follow_what_is_set_then(with_amx, mask):
    problem = budget.random_problem((33,), 100, 63, mask=mask)
    exact = budget.ours(problem, "cpu", schedule="fused")
    with precision("medium"):
        low = budget.ours(problem, "cpu", schedule="fused")
    for forward, backward, y, gradients in (("medium", "highest", low, exact), ("highest", "medium", exact, low)):
        x, w, b = budget.leaves(problem)
        with precision(forward):
            found = mk.mix_linear(
                x, w, problem.u, b, p=0.7, mask=mask, seed=problem.seed, backend="cpu", schedule="fused"
            )
        with precision(backward):
            found.backward(problem.g)
        assert torch.equal(found, y.y)
        assert torch.equal(x.grad, gradients.dx)
        assert torch.equal(w.grad, gradients.dw)
    assert not torch.equal(low.y, exact.y)
    assert not torch.equal(low.dx, exact.dx)
    assert not torch.equal(low.dw, exact.dw)


def test_small_products_stay_exact(with_amx):
    """As F.linear's: oneDNN is not called for them."""
    problem = budget.random_problem((16,), 16, 16)
    exact = budget.ours(problem, "cpu", schedule="fused")
    with precision("medium"):
        low = budget.ours(problem, "cpu", schedule="fused")
        larger = budget.random_problem((17,), 16, 16)
        assert_rounded(larger, budget.ours(larger, "cpu", schedule="fused"))
    for name in budget.RESULTS:
        assert torch.equal(getattr(low, name), getattr(exact, name)), name


@pytest.mark.parametrize("name", ["highest", "high"])
def test_other_precisions_stay_exact(with_amx, name):
    problem = budget.random_problem((33,), 100, 63)
    with precision(name):
        budget.assert_in_budget(problem, budget.ours(problem, "cpu", schedule="fused"))


@axes.masks
def test_without_amx_nothing_changes(monkeypatch, mask):
    monkeypatch.setattr(cpu, "_BF16_UNIT", "dot")
    problem = budget.random_problem((33,), 100, 63, mask=mask)
    exact = budget.ours(problem, "cpu", schedule="fused")
    with precision("medium"):
        low = budget.ours(problem, "cpu", schedule="fused")
    for name in budget.RESULTS:
        assert torch.equal(getattr(low, name), getattr(exact, name)), name


def test_f_linear_rounds_with_amx_alone():
    """What all of this follows."""
    x, w = torch.randn(64, 512), torch.randn(96, 512)
    with precision("medium"):
        y = F.linear(x, w)
    error = (y.double() - x.double() @ w.double().t()).norm() / y.double().norm()
    assert (error > 1e-4) == (cpu._BF16_UNIT == "tiles")


def test_each_way_to_set_it_is_read():
    asked = cpu._C.cpu_float32_may_be_rounded
    assert not asked()
    with precision("medium"):
        assert asked()
        with torch.backends.mkldnn.flags(enabled=False):
            assert not asked()
    assert not asked()
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return  # before torch 2.9
    before = torch.backends.mkldnn.matmul.fp32_precision
    for name in ("bf16", "ieee"):
        torch.backends.mkldnn.matmul.fp32_precision = name
        found = asked()
        torch.backends.mkldnn.matmul.fp32_precision = before
        assert found == (name == "bf16")


def test_auto_follows_the_rule_of_bfloat16(monkeypatch):
    monkeypatch.setattr(cpu, "_LIBRARY_IS_FASTER", True)
    phi = MixedWeight(torch.randn(40, 30), None, None, None)
    x = {rows: torch.empty(rows, 30) for rows in (255, 2047, 2048)}

    def fused():
        return [cpu._is_fused("auto", rows, phi) for rows in x.values()]

    for unit, medium in (("tiles", [True, True, False]), ("dot", [True, False, False])):
        monkeypatch.setattr(cpu, "_BF16_UNIT", unit)
        assert fused() == [True, False, False]
        with precision("medium"):
            assert fused() == medium
