"""float16 on a CPU without an instruction for it: through float32 products, fused and staged, rounded once."""

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk
from mixout_kernels.backends import cpu

from . import axes, budget

pytestmark = [
    pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="NO EXTENSION"),
    pytest.mark.usefixtures("poisoned_memory"),
]
SCHEDULES = cpu.schedules(torch.float16)
widened = pytest.mark.skipif(cpu._LIBRARY_MULTIPLIES_F16, reason="the library multiplies float16 here")


# Tiles are cut off in every dimension; the depth is in several blocks, the columns of c too.
@axes.masks
@axes.transposed
@axes.targets
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 1000, 63), (29, 63, 800), (300, 47, 33), (45, 3000, 100)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_and_gradients_of_odd_sizes(mask, transposed, target, shape, schedule):
    rows, in_features, out_features = shape
    problem = budget.random_problem(
        (rows,), in_features, out_features, dtype=torch.float16, mask=mask, target=target, transposed=transposed
    )
    budget.assert_in_budget(problem, budget.ours(problem, "cpu", schedule=schedule))


@axes.masks
@axes.transposed
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_float32_weight_under_autocast(mask, transposed, schedule):
    problem = budget.random_problem((37,), 500, 90, mask=mask, transposed=transposed)
    problem.g = problem.g.half()
    x, w, b = budget.leaves(problem)
    with torch.autocast("cpu", torch.float16):
        y = mk.mix_linear(x, w, problem.u, b, p=0.7, mask=mask, seed=problem.seed, backend="cpu", schedule=schedule)
    y.backward(problem.g)
    x2, w2, b2 = budget.leaves(problem)
    with torch.autocast("cpu", torch.float16):
        plain = F.linear(x2, budget.plain_mixout(w2, problem.u, problem.keep, problem.scale), b2)
    plain.backward(problem.g)
    exact, (norm1, norm2) = budget.truth(problem), budget.magnitudes(problem)
    got = {"y": y.detach(), "dx": x.grad, "dw": w.grad, "db": b.grad}
    torchs = {"y": plain.detach(), "dx": x2.grad, "dw": w2.grad, "db": b2.grad}
    for name, terms in {"y": 501, "dx": 90, "dw": 37, "db": 37}.items():
        budget.assert_close(
            got[name],
            getattr(exact, name),
            torchs[name],
            norm1=getattr(norm1, name),
            norm2=getattr(norm2, name),
            dtype=torch.float16 if name == "y" else torch.float32,
            rounding=torch.float16,
            terms=terms,
            scale=problem.scale,
            name=name,
        )


@axes.masks
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("way", ["strided", "operand", "column of a matrix"])
def test_operands_as_they_lie(mask, schedule, way):
    """What a product reads in place ends where its memory ends, and rows need not follow one another."""
    problem = budget.random_problem((33,), 70, 45, dtype=torch.float16, mask=mask)
    if way == "operand":  # nothing is mixed: the weight itself is read
        problem.p, problem.grad_p, problem.u = 0.0, 0.5, None
    elif way == "strided":
        problem.x = torch.cat([problem.x, problem.x + 1], dim=1)[:, :70]
        problem.g = torch.cat([problem.g, problem.g + 1], dim=1)[:, :45]
    else:
        problem.x = problem.x.t().contiguous().t()
    budget.assert_in_budget(problem, budget.ours(problem, "cpu", schedule=schedule))


@widened
@axes.masks
@axes.transposed
def test_staged_is_the_library_s_float32_product_rounded_once(mask, transposed):
    problem = budget.random_problem((40,), 100, 63, dtype=torch.float16, mask=mask, transposed=transposed)
    results = budget.ours(problem, "cpu", schedule="staged")
    phi = mk.reference.mixout(problem.w, problem.u, p=0.7, mask=mask, seed=problem.seed).float()
    assert torch.equal(results.y, F.linear(problem.x.float(), phi, problem.b.float()).half())
    assert torch.equal(results.dx, (problem.g.float() @ phi).half())


@pytest.mark.skipif("fused" not in SCHEDULES, reason="NO AVX-512 HERE: float16 is staged")
def test_the_fused_product_is_as_exact_as_float32():
    """The sums are float32 ones (sqrt(n) eps |t|_1, see budget.py), and y is rounded once, by half a unit."""
    problem = budget.random_problem((64,), 2000, 64, dtype=torch.float16)
    y = budget.ours(problem, "cpu", schedule="fused").y
    phi = mk.reference.mixout(problem.w, problem.u, p=0.7, seed=problem.seed)
    x, phi, b = problem.x.double(), phi.double(), problem.b.double()
    exact, norm1 = F.linear(x, phi, b), F.linear(x.abs(), phi.abs(), b.abs())
    sums = 2001**0.5 * torch.finfo(torch.float32).eps * norm1
    assert ((y.double() - exact).abs() <= torch.finfo(torch.float16).eps / 2 * exact.abs() + sums).all()


def test_auto_is_staged_where_the_library_multiplies_float16(monkeypatch):
    phi = cpu.MixedWeight(torch.randn(40, 30), None, None, None)
    monkeypatch.setattr(cpu, "_HAS_F16_PRODUCT", True)
    for library in (True, False):
        monkeypatch.setattr(cpu, "_LIBRARY_MULTIPLIES_F16", library)
        assert cpu._is_fused("auto", torch.empty(5000, 30, dtype=torch.float16), phi) == (not library)
        assert cpu.premixing_pays(torch.float16) == library
    monkeypatch.setattr(cpu, "_HAS_F16_PRODUCT", False)
    assert cpu.schedules(torch.float16) == ("staged",)
    assert cpu.premixing_pays(torch.float16)
