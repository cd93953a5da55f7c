"""The error budget of the suite, and the mixed linear layer in float64 that it is measured against.

For every element of a result that is a sum of n terms t,

    |ours - truth|  <=  2 |torch - truth|  +  BAND eps (|truth| + |t|_2)  +  sqrt(n) eps32 |t|_1  +  BAND tiny

truth       float64, computed here from the formulas of the paper, without autograd and without the package (only the
            mask comes from ``reference``, which has tests of its own: test_philox.py)
torch       three lines of plain PyTorch with autograd, in the dtype under test: what a user would write instead
|t|_1,2     the sum of the terms' absolute values, and the root of the sum of their squares
eps, eps32  the spacing at 1 of the dtype under test, and of the dtype that sums are accumulated in: float32, or float64
            for float64
tiny        the smallest positive number, times the mask's scale, which multiplies what has underflown

The factor 2 asks for an error of the size of PyTorch's own. It is not enough alone: PyTorch's error of one element is
exactly zero now and then. So the roundings that no order of summation avoids are paid for: the result's, half an eps of
it; each term's (Phi is rounded), half an eps of it, which add up as independent errors do, in the 2-norm; and the
sum's, sqrt(n) eps32 / 2 of its terms with a constant near 1 whatever the order (Higham & Mary, "A new approach to
probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). BAND = 4 is eight of those halves: two or three
roundings in a row (a product, its scale, a cast), at four standard deviations.

test_budget.py shows which mistakes this finds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import mixout_kernels as mk

BAND = 4
RESULTS = ("y", "dx", "dw", "db")


@dataclass
class Problem:
    """One mixed linear layer: x [..., in], w and u [out, in], b [out], the gradient g [..., out], and its mask."""

    x: Tensor
    w: Tensor
    u: Tensor | None
    b: Tensor | None
    g: Tensor
    p: float
    mask: str
    seed: int
    grad_p: float = 0.0
    rescale: bool = True

    @property
    def keep(self) -> Tensor:
        """The mask in the weight's shape, on the weight's device."""
        return self._mask(self.p)

    @property
    def keep_gradient(self) -> Tensor:
        """Where dw is not zero: the same words against q = 1 - (1 - p)(1 - grad_p)."""
        return self._mask(self.p if self.grad_p == 0 else 1 - (1 - self.p) * (1 - self.grad_p))

    def _mask(self, p: float) -> Tensor:
        return _reference_mask(self.seed, p, self.w.shape, self.mask).expand(self.w.shape).to(self.w.device)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p) if self.p < 1 else 1.0

    @property
    def gradient_scale(self) -> float:
        return self.scale / (1 - self.grad_p) if self.rescale and self.grad_p < 1 else self.scale

    def double(self) -> Problem:
        return replace(
            self,
            **{name: None if (t := getattr(self, name)) is None else t.double() for name in ("x", "w", "u", "b", "g")},
        )


@dataclass
class Results:
    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor | None


def random_problem(
    rows: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    p: float = 0.7,
    mask: str = "neuron",
    seed: int = 20200426,
    target: torch.dtype | bool | None = True,
    bias: bool = True,
    transposed: bool = False,
    integers: bool = False,
    grad_p: float = 0.0,
    rescale: bool = True,
) -> Problem:
    """Normal data, or small integers. ``target``: True for the weight's dtype, None for zero, or a dtype."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def draw_weight() -> Tensor:
        return draw(in_features, out_features).t() if transposed else draw(out_features, in_features)

    w, u = draw_weight(), draw_weight()
    if target is None:
        u = None
    elif isinstance(target, torch.dtype):
        u = u.to(target)
    return Problem(
        x=draw(*rows, in_features),
        w=w,
        u=u,
        b=draw(out_features) if bias else None,
        g=draw(*rows, out_features),
        p=p,
        mask=mask,
        seed=seed,
        grad_p=grad_p,
        rescale=rescale,
    )


@functools.cache
def _reference_mask(seed: int, p: float, shape: torch.Size, mask: str) -> Tensor:
    """The decisions of a 2-D weight, of size 1 where one is shared."""
    keep = mk.reference.keep_mask(seed, p=p, shape=shape, mask=mask)
    return keep.unsqueeze(1) if mask == "output" else keep


def rows_of(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def truth(problem: Problem) -> Results:
    q = problem.double()
    phi = plain_mixout(q.w, q.u, q.keep, q.scale)
    x, g = rows_of(q.x), rows_of(q.g)
    return Results(
        y=(x @ phi.t() + (0 if q.b is None else q.b)).reshape(q.g.shape),
        dx=(g @ phi).reshape(q.x.shape),
        dw=torch.where(q.keep_gradient, q.gradient_scale * (g.t() @ x), 0.0),
        db=None if q.b is None else g.sum(0),
    )


def magnitudes(problem: Problem) -> tuple[Results, Results]:
    """|t|_1 and |t|_2 of the terms of every result."""
    q = problem.double()
    u = torch.zeros_like(q.w) if q.u is None else q.u
    phi = torch.where(q.keep, (q.w - u).abs() * q.scale + u.abs(), u.abs())

    def norm(order: int) -> Results:
        def root(t: Tensor) -> Tensor:
            return t ** (1 / order)

        x, g, f, b = (None if t is None else t.abs() ** order for t in (rows_of(q.x), rows_of(q.g), phi, q.b))
        return Results(
            y=root(x @ f.t() + (0 if b is None else b)).reshape(q.g.shape),
            dx=root(g @ f).reshape(q.x.shape),
            dw=torch.where(q.keep_gradient, q.gradient_scale * root(g.t() @ x), 0.0),
            db=None if b is None else root(g.sum(0)),
        )

    return norm(1), norm(2)


def plain_mixout(w: Tensor, u: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    u = torch.zeros_like(w) if u is None else u
    return torch.where(keep, u + (w - u) * scale, u)


def plain_torch(problem: Problem) -> Results:
    """The plain formula in the problem's own dtype; a half-precision weight is mixed in float32, as in the package."""
    x, w, b = leaves(problem)
    dtype = torch.promote_types(w.dtype, torch.float32)
    u = None if problem.u is None else problem.u.to(dtype)
    phi = w if problem.p == 0 else plain_mixout(w.to(dtype), u, problem.keep, problem.scale).to(w.dtype)
    phi = phi.detach().requires_grad_()
    y = F.linear(x, phi, b)
    y.backward(problem.g)
    dw = torch.where(problem.keep_gradient, phi.grad.to(dtype) * problem.gradient_scale, 0.0).to(w.dtype)
    return Results(y.detach(), x.grad, dw, None if b is None else b.grad)


def ours(problem: Problem, backend: str, *, schedule: str | None = None, **options: object) -> Results:
    x, w, b = leaves(problem)
    y = mk.mix_linear(
        x,
        w,
        problem.u,
        b,
        p=problem.p,
        grad_p=problem.grad_p,
        rescale=problem.rescale,
        mask=problem.mask,
        seed=problem.seed,
        backend=backend,
        schedule=schedule,
        **options,
    )
    y.backward(problem.g)
    return Results(y.detach(), x.grad, w.grad, None if b is None else b.grad)


def leaves(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, w and b as leaves that require grad, in the strides they have."""
    return tuple(None if t is None else t.detach().requires_grad_() for t in (problem.x, problem.w, problem.b))


def assert_in_budget(problem: Problem, results: Results, *, factor: Callable[[str], float] = lambda name: 1.0) -> None:
    """Every element of every result within the budget; ``factor(name)`` > 0 multiplies the truth and its terms."""
    exact, (norm1, norm2), torch_results = truth(problem), magnitudes(problem), plain_torch(problem)
    (out_features, in_features), rows = problem.w.shape, math.prod(problem.x.shape[:-1])
    terms = {"y": in_features + 1, "dx": out_features, "dw": rows, "db": rows}
    for name in RESULTS:
        if getattr(exact, name) is None:
            assert getattr(results, name) is None, f"{name}: expected None"
            continue
        assert_close(
            getattr(results, name),
            getattr(exact, name) * factor(name),
            getattr(torch_results, name).double() * factor(name),
            norm1=getattr(norm1, name) * factor(name),
            norm2=getattr(norm2, name) * factor(name),
            dtype=(problem.w if name == "dw" else problem.x).dtype,
            terms=terms[name],
            scale=problem.gradient_scale if name == "dw" else problem.scale,
            name=name,
        )


def assert_close(
    result: Tensor,
    exact: Tensor,
    torch_result: Tensor,
    *,
    norm1: Tensor,
    norm2: Tensor | float,
    dtype: torch.dtype,
    terms: int = 1,
    scale: float = 1.0,
    rounding: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """One tensor within the budget. ``rounding``: the dtype of the coarsest step, where it is not the result's own."""
    assert result.dtype == dtype, f"{name}: expected {dtype}, got {result.dtype}"
    assert result.shape == exact.shape, f"{name}: expected {list(exact.shape)}, got {list(result.shape)}"
    info = torch.finfo(rounding or dtype)
    tiny = info.smallest_normal * info.eps * max(1.0, scale)
    eps32 = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    error = (result.double() - exact).abs()
    unavoidable = BAND * (info.eps * (exact.abs() + norm2) + tiny) + math.sqrt(terms) * eps32 * norm1
    budget = 2 * (torch_result.double() - exact).abs() + unavoidable
    outside = ~(error <= budget)  # also NaN
    assert not outside.any(), (
        f"{name}: {int(outside.sum())} of {outside.numel()} elements outside the budget; the worst is "
        f"{(error / budget).nan_to_num(math.inf).max().item():.1f} times it"
    )
