"""The error budget has teeth: it lets PyTorch's own results pass and each of these mistakes not."""

import pytest
import torch

from . import axes, budget


def problem_of(dtype, mask="neuron"):
    return budget.random_problem((33,), 100, 63, dtype=dtype, p=0.7, mask=mask)


@axes.dtypes
@axes.masks
def test_plain_torch_is_within(dtype, mask):
    problem = problem_of(dtype, mask)
    budget.assert_in_budget(problem, budget.plain_torch(problem))


def swap(name, change):
    def mistake(problem):
        results = budget.plain_torch(problem)
        setattr(results, name, change(getattr(results, name), problem))
        return results

    return mistake


def one_bit_of_the_mask(problem):
    """The decision of one input feature turned round."""
    other = budget.random_problem((33,), 100, 63, dtype=problem.x.dtype, p=0.7)
    column = int(problem.keep[0].nonzero()[0])
    other.w = problem.w.clone()
    other.w[:, column] = problem.u[:, column]
    return budget.plain_torch(other)


def wrong_in_a_few(t, problem):
    """One in fifty with half of its digits wrong."""
    t = t.clone()
    t.flatten()[::50] *= 1 + 4 * torch.finfo(t.dtype).eps ** 0.5
    return t


MISTAKES = {
    "one bit of the mask": one_bit_of_the_mask,
    "a few elements off": swap("y", wrong_in_a_few),
    "no 1 / (1 - p) in dw": swap("dw", lambda t, problem: t / problem.scale),
    "1 / p for 1 / (1 - p)": swap("dw", lambda t, problem: t / problem.scale / problem.p),
    "dx with the plain weight": swap("dx", lambda t, problem: problem.g @ problem.w),
    "no bias": swap("y", lambda t, problem: t - problem.b),
    "a NaN": swap("dx", lambda t, problem: t.index_fill(0, torch.tensor([3]), float("nan"))),
    "a row too few in db": swap("db", lambda t, problem: problem.g[1:].sum(0)),
    "a dropped column of dw not zero": swap("dw", lambda t, problem: torch.where(problem.keep, t, 1e-6)),
    "another dtype": swap("y", lambda t, problem: t.double() if t.dtype != torch.float64 else t.float()),
    "transposed": swap("dw", lambda t, problem: t.t()),
    "a missing gradient": swap("dw", lambda t, problem: torch.zeros_like(t)),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
@axes.dtypes
def test_mistakes_are_not(mistake, dtype):
    problem = problem_of(dtype)
    with pytest.raises(AssertionError, match=r"outside the budget|expected"):
        budget.assert_in_budget(problem, MISTAKES[mistake](problem))


def test_lower_precision_inside_is_not():
    """float32 results that went through bfloat16, or through TF32's ten bits, on the way."""
    problem = problem_of(torch.float32)
    for bits in (torch.bfloat16, torch.float16):
        low = budget.Problem(**{**vars(problem), "x": problem.x.to(bits).float()})
        with pytest.raises(AssertionError, match="outside the budget"):
            budget.assert_in_budget(problem, budget.plain_torch(low))
