"""The mixed weight: kept entries, dropped entries, what must not leak, and that every path mixes the same operand."""

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk
from mixout_kernels.draws import strides_of

from . import axes, budget
from .memory import keep_of

SEED = 31
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def weight_and_target(shape, dtype, device):
    generator = torch.Generator().manual_seed(sum(shape))
    return (axes.normal(shape, dtype, device, generator=generator) for _ in range(2))


def assert_mixed(phi, w, u, p, mask, *, bitwise):
    """Dropped entries are u itself; kept ones the reference's, bit for bit or within the budget."""
    keep = keep_of(w, p, mask, SEED)
    target = torch.zeros_like(w) if u is None else u
    assert torch.equal(phi[~keep], target[~keep].to(phi.dtype))
    expected = mk.reference.mixout(w, u, p=p, mask=mask, seed=SEED)
    if bitwise:
        assert torch.equal(phi, expected.to(phi.dtype))
    w64, u64 = w.double(), target.double()
    scale = 1 / (1 - p)
    budget.assert_close(
        phi[keep],
        (u64 + (w64 - u64) * scale)[keep],
        expected[keep],
        norm1=((w64 - u64).abs() * scale + u64.abs())[keep],
        norm2=0,  # mixed in float32 whatever the dtype, and rounded once
        terms=4,
        dtype=w.dtype,
    )


@axes.dtypes
@axes.masks
@pytest.mark.parametrize("shape", [(1,), (100,), (1, 1), (63, 100), (5, 1000), (4, 63, 3), (3, 5, 2, 7)], ids=str)
def test_mixout(any_case, dtype, mask, shape):
    any_case.require(dtype)
    w, u = weight_and_target(shape, dtype, any_case.device)
    before = w.clone(), u.clone()
    for p in (1e-9, 0.5, 0.7):
        for target in (u, None):
            phi = mk.mixout(w, target, p=p, mask=mask, seed=SEED, backend=any_case.backend)
            assert phi.shape == w.shape
            assert phi.dtype == dtype
            assert phi.data_ptr() != w.data_ptr()
            assert_mixed(phi, w, target, p, mask, bitwise=any_case.backend == "cpu")
    assert torch.equal(w, before[0])
    assert torch.equal(u, before[1])


@axes.masks
def test_bfloat16_target_of_a_float32_weight(any_case, mask):
    any_case.require(torch.float32, torch.bfloat16)
    w, u = weight_and_target((63, 100), torch.float32, any_case.device)
    u = u.bfloat16()
    phi = mk.mixout(w, u, p=0.7, mask=mask, seed=SEED, backend=any_case.backend)
    assert_mixed(phi, w, u, 0.7, mask, bitwise=any_case.backend == "cpu")


@axes.masks
@pytest.mark.parametrize("layout", ["transposed", "every second column", "every second row", "offset", "permuted"])
def test_mixout_of_strided_weights(any_case, mask, layout):
    view = {
        "transposed": lambda t: t.t(),
        "every second column": lambda t: t[:, ::2],
        "every second row": lambda t: t[::2],
        "offset": lambda t: t[1:, 3:],
        "permuted": lambda t: t.reshape(4, 16, 20).permute(2, 0, 1),
    }[layout]
    w, u = map(view, weight_and_target((64, 20), torch.float32, any_case.device))
    for target in (u, u.contiguous(), None):
        strided = mk.mixout(w, target, p=0.7, mask=mask, seed=SEED, backend=any_case.backend)
        dense = mk.mixout(
            w.contiguous(),
            None if target is None else u.contiguous(),
            p=0.7,
            mask=mask,
            seed=SEED,
            backend=any_case.backend,
        )
        assert torch.equal(strided, dense)
        assert_mixed(strided, w, target, 0.7, mask, bitwise=any_case.backend == "cpu")


@axes.dtypes
@axes.masks
def test_mixout_gradient(any_case, dtype, mask):
    any_case.require(dtype)
    w, u = weight_and_target((63, 100), dtype, any_case.device)
    g = torch.randn(63, 100, device=any_case.device).to(dtype)
    keep = keep_of(w, 0.75, mask, SEED)  # 1 / (1 - p) = 4 is exact, so the gradient is too
    for paper, scale in ((False, 4.0), (True, 1.0)):
        leaf = w.clone().requires_grad_()
        phi = mk.mixout(leaf, u, p=0.75, mask=mask, seed=SEED, paper_gradient=paper, backend=any_case.backend)
        phi.backward(g)
        assert leaf.grad.dtype == dtype
        if paper and any_case.backend == "reference":
            # (1 - p) * 1 / (1 - p), multiplied by both in turn: both are powers of two here.
            assert torch.equal(leaf.grad, torch.where(keep, g, 0))
        assert torch.equal(leaf.grad, torch.where(keep, g * scale, 0))


@axes.masks
def test_mixout_at_p_0_and_in_eval_mode_is_the_weight_itself(any_case, mask):
    w, u = weight_and_target((5, 6), torch.float32, any_case.device)
    w.requires_grad_()
    assert mk.mixout(w, u, p=0, mask=mask, backend=any_case.backend) is w
    assert mk.mixout(w, u, p=0.9, mask=mask, training=False, backend=any_case.backend) is w


@axes.dtypes
@axes.masks
def test_mixout_at_p_1_is_the_target(any_case, dtype, mask):
    any_case.require(dtype)
    w, u = weight_and_target((5, 63), dtype, any_case.device)
    for target in (u, None):
        leaf = torch.full_like(w, float("nan")).requires_grad_()
        phi = mk.mixout(leaf, target, p=1, mask=mask, seed=SEED, backend=any_case.backend)
        phi.backward(torch.ones_like(phi))
        assert torch.equal(phi, torch.zeros_like(w) if target is None else u)
        assert torch.equal(leaf.grad, torch.zeros_like(w))


@axes.dtypes
@axes.masks
@axes.transposed
def test_output_for_the_identity_is_the_mixed_weight(any_case, dtype, mask, transposed):
    """x = I: nothing is rounded by the product, so every schedule must show the operand that ``mixout`` returns."""
    any_case.require(dtype)
    out_features, in_features = 63, 100
    w, u = weight_and_target(
        (in_features, out_features) if transposed else (out_features, in_features), dtype, any_case.device
    )
    if transposed:
        w, u = w.t(), u.t()
    x = torch.eye(in_features, dtype=dtype, device=any_case.device)
    for p in (1e-9, 0.5, 0.7):
        for target in (u, None):
            expected = mk.mixout(w, target, p=p, mask=mask, seed=SEED, backend=any_case.backend)
            for schedule in any_case.schedules(dtype):
                y = mk.mix_linear(x, w, target, p=p, mask=mask, seed=SEED, backend=any_case.backend, schedule=schedule)
                assert torch.equal(y.t(), expected), (p, schedule)
                assert_mixed(y.t(), w, target, p, mask, bitwise=any_case.backend == "cpu")


@axes.masks
def test_output_for_the_identity_through_the_products_for_many_rows(any_case, mask):
    """1024 rows and 128 features and more: the CPU backend takes another library for its products from there on."""
    any_case.skip_if_emulated("a million elements take minutes in an emulation")
    w, u = weight_and_target((160, 1030), torch.float32, any_case.device)
    x = torch.eye(1030, device=any_case.device)
    for target in (u, None):
        y = mk.mix_linear(x, w, target, p=0.7, mask=mask, seed=SEED, backend=any_case.backend)
        assert_mixed(y.t(), w, target, 0.7, mask, bitwise=any_case.backend == "cpu")


@axes.masks
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@axes.wide_and_narrow
def test_a_dropped_nan_reaches_nothing(any_case, mask, poison, dtype):
    any_case.require(dtype)
    p = 0.5
    clean = budget.random_problem((9,), 63, 20, dtype=dtype, device=any_case.device, p=p, mask=mask)
    for target in (clean.u, None):
        clean.u = target
        keep = clean.keep
        for schedule in any_case.schedules(dtype):
            expected = budget.ours(clean, any_case.backend, schedule=schedule)
            poisoned = budget.Problem(**{**vars(clean), "w": torch.where(keep, clean.w, poison)})
            got = budget.ours(poisoned, any_case.backend, schedule=schedule)
            for name in budget.RESULTS:
                assert torch.equal(getattr(got, name), getattr(expected, name)), (name, schedule)
        phi = mk.mixout(poisoned.w, target, p=p, mask=mask, seed=clean.seed, backend=any_case.backend)
        assert phi.isfinite().all()


@axes.masks
def test_a_kept_nan_reaches_the_output(any_case, mask):
    """The counterpart of the test above: nothing is cleaned up on the way."""
    problem = budget.random_problem((9,), 63, 20, device=any_case.device, p=0.5, mask=mask)
    problem.w = torch.where(problem.keep, float("nan"), problem.w)
    phi = mk.mixout(problem.w, problem.u, p=0.5, mask=mask, seed=problem.seed, backend=any_case.backend)
    assert torch.equal(phi.isnan(), problem.keep)
    for schedule in any_case.schedules():
        y = budget.ours(problem, any_case.backend, schedule=schedule).y
        assert torch.equal(y.isnan(), problem.keep.any(1).expand(y.shape))


@axes.masks
def test_gradient_of_a_dropped_entry_is_zero_whatever_the_input(any_case, mask):
    problem = budget.random_problem((9,), 63, 20, device=any_case.device, p=0.5, mask=mask)
    problem.x[:, :3] = float("inf")
    problem.g[0, 0] = float("nan")
    for schedule in any_case.schedules():
        dw = budget.ours(problem, any_case.backend, schedule=schedule).dw
        assert torch.equal(dw[~problem.keep], torch.zeros_like(dw[~problem.keep]))


def test_bitwise_linear_of_the_mixed_weight(case):
    """The staged product of the CPU backend is F.linear's own, so the whole layer is, bit for bit."""
    if case.backend != "cpu":
        pytest.skip("the order of summation of a GPU kernel is its own")
    problem = budget.random_problem((33,), 100, 63)
    for mask in axes.MASKS:
        phi = mk.reference.mixout(problem.w, problem.u, p=0.7, mask=mask, seed=SEED)
        options = {"p": 0.7, "mask": mask, "seed": SEED, "backend": "cpu", "schedule": "staged"}
        y = mk.mix_linear(problem.x, problem.w, problem.u, problem.b, **options)
        assert torch.equal(y, F.linear(problem.x, phi, problem.b))


@axes.masks
@pytest.mark.parametrize("lane", range(4))
def test_the_word_at_the_threshold_is_kept(any_case, mask, lane):
    """keep(i) is word >= floor(p 2^32). The words of seed 0 are Philox's known answers, so p can be put on one."""
    words = mk.reference.philox4x32_10(torch.tensor(0), torch.tensor([0]))[0].tolist()
    word = words[lane * strides_of(mask, (1, 4))[1]]
    w = torch.ones(1, 4, device=any_case.device)
    x = torch.eye(4, device=any_case.device)
    for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        for target in (torch.zeros_like(w), None):
            phi = mk.mixout(w, target, p=p, mask=mask, seed=0, backend=any_case.backend)
            assert bool(phi[0, lane] != 0) == kept
            for schedule in any_case.schedules():
                y = mk.mix_linear(x, w, target, p=p, mask=mask, seed=0, backend=any_case.backend, schedule=schedule)
                assert torch.equal(y.t(), phi)
