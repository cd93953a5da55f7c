"""Small integers and p = 1/2 or 3/4: no operation rounds, so every backend, schedule and dtype must equal float64.

This is the strictest check there is of indices, masks, layouts and sums: an error of one element cannot hide in a
tolerance. Half-precision results round the exact sum once, which is what ``.to(dtype)`` of the truth does.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from . import axes, budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_exact(problem, case, schedule=None):
    exact = budget.truth(problem)
    results = budget.ours(problem, case.backend, schedule=schedule)
    for name in budget.RESULTS:
        result, expected = getattr(results, name), getattr(exact, name)
        if expected is None:
            assert result is None
        else:
            assert result.dtype == problem.x.dtype
            assert torch.equal(result, expected.to(result.dtype)), name


@given(
    rows=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    dtype=st.sampled_from(axes.DTYPES),
    mask=st.sampled_from(axes.MASKS),
    p=st.sampled_from([0.5, 0.75]),
    seed=st.integers(-(2**63), 2**63 - 1),
    target=st.sampled_from([True, None]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
@example([], 1, 1, torch.float32, "neuron", 0.5, 0, True, True, False)
@example([3, 0, 2], 5, 7, torch.bfloat16, "weight", 0.5, 0, None, True, True)
def test_any_shape(any_case, rows, in_features, out_features, dtype, mask, p, seed, target, bias, transposed):
    if any_case.backend not in ("cpu", "reference") and dtype == torch.float64:
        dtype = torch.float32
    problem = budget.random_problem(
        rows,
        in_features,
        out_features,
        dtype=dtype,
        device=any_case.device,
        p=p,
        mask=mask,
        seed=seed,
        target=target,
        bias=bias,
        transposed=transposed,
        integers=True,
    )
    for schedule in any_case.schedules(dtype):
        assert_exact(problem, any_case, schedule)


@axes.dtypes
@axes.masks
@axes.targets
@pytest.mark.parametrize("shape", [(1, 1000, 1), (1000, 1, 63), (63, 100, 1000), (257, 1000, 63)], ids=str)
def test_odd_sizes(any_case, dtype, mask, target, shape):
    any_case.require(dtype)
    rows, in_features, out_features = shape
    if rows * in_features * out_features > 10**6:
        any_case.skip_if_emulated("too many products")
    problem = budget.random_problem(
        (rows,),
        in_features,
        out_features,
        dtype=dtype,
        device=any_case.device,
        p=0.5,
        mask=mask,
        target=target,
        integers=True,
    )
    for schedule in any_case.schedules(dtype):
        assert_exact(problem, any_case, schedule)


@axes.masks
@pytest.mark.parametrize("target", [True, torch.bfloat16, None], ids=["target", "bf16 target", "zero"])
@axes.transposed
@axes.wide_and_narrow
@pytest.mark.parametrize(
    "shape",
    [(13, 800, 33), (15, 193, 770), (29, 192, 768), (390, 31, 17), (1025, 96, 64), (3, 1700, 210)],
    ids=str,
)
def test_more_than_one_block(any_case, mask, target, transposed, dtype, shape):
    """Sizes on either side of the blocks of the CPU's fused products.

    In float32: 14 rows, 32 and 768 columns, a depth of 192. In bfloat16: 14, 16 or 32 rows, 16, 32 and 192 columns, a
    depth of 2, 32 and 256.
    """
    any_case.skip_if_emulated("too many products")
    rows, in_features, out_features = shape
    problem = budget.random_problem(
        (rows,),
        in_features,
        out_features,
        dtype=dtype,
        device=any_case.device,
        p=0.5,
        mask=mask,
        target=target,
        transposed=transposed,
        integers=True,
    )
    for schedule in any_case.schedules(dtype):
        assert_exact(problem, any_case, schedule)


def test_paper_gradient_is_the_true_one_without_the_factor(any_case):
    for mask in axes.MASKS:
        problem = budget.random_problem((20,), 63, 40, device=any_case.device, p=0.75, mask=mask, integers=True)
        for schedule in any_case.schedules():
            true = budget.ours(problem, any_case.backend, schedule=schedule)
            paper = budget.ours(problem, any_case.backend, schedule=schedule, paper_gradient=True)
            assert torch.equal(paper.dw * 4, true.dw)
            assert paper.dw.any()
            assert torch.equal(paper.y, true.y)
            assert torch.equal(paper.dx, true.dx)
            assert torch.equal(paper.db, true.db)


@axes.masks
@axes.transposed
@axes.wide_and_narrow
def test_any_number_of_threads(any_case, mask, transposed, dtype):
    """Blocks of work begin and end elsewhere: at the first thread's last element something would be left or doubled."""
    if any_case.device != "cpu":
        pytest.skip("threads of the CPU")
    any_case.skip_if_emulated("too many products")
    problem = budget.random_problem(
        (67,), 501, 203, dtype=dtype, p=0.5, mask=mask, transposed=transposed, integers=True
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for schedule in any_case.schedules(dtype):
                assert_exact(problem, any_case, schedule)
    finally:
        torch.set_num_threads(before)
