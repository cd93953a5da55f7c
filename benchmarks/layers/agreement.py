"""Does a layer compute what the reference computes? A speed-up with a wrong result is none.

    |ours - truth| <= 2 max |reference in the same dtype - truth| + band        truth: the reference in float64

The band is 4 eps of the accumulator times a bound of the accumulated magnitude (Cauchy-Schwarz: sum |x_k phi_k| <=
|x| |phi|), and one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixout_kernels import reference
from mixout_kernels.functional import Mask

from .cases import Operands
from .variants import Target, Variant

SEED = 20200427

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # y, dx, dw, db


@dataclass(frozen=True)
class Verdict:
    matches: bool
    worst: float  # error / budget, over all results
    where: str


class Agreement:
    """What the reference says of one mask, p and target, and the check of a layer against it."""

    def __init__(self, operands: Operands, mask: Mask, p: float, target: Target) -> None:
        self.operands = operands
        exact = Operands(*(t.detach().double().requires_grad_(t.requires_grad) for t in vars(operands).values()))

        def layer(o: Operands) -> Tensor:
            u = None if target == "zero" else o.target
            return reference.mix_linear(o.x, o.weight, u, o.bias, p=p, mask=mask, seed=SEED)

        self.truth, same_dtype = _results(layer, exact), _results(layer, operands)
        u = None if target == "zero" else exact.target
        phi = reference.mixout(exact.weight.detach(), u, p=p, mask=mask, seed=SEED)
        x, g, scale = exact.x.detach(), exact.grad, 1 / (1 - p)
        magnitudes = (
            torch.outer(x.norm(dim=1), phi.norm(dim=1)) + exact.bias.detach().abs(),
            torch.outer(g.norm(dim=1), phi.norm(dim=0)),
            torch.outer(g.norm(dim=0), x.norm(dim=0)) * scale,
            g.abs().sum(0),
        )
        eps = torch.finfo(operands.x.dtype).eps
        accumulator_eps = min(eps, torch.finfo(torch.float32).eps)
        self.limits = [
            2 * (a.double() - t).abs().max() + 4 * accumulator_eps * magnitude + eps * t.abs()
            for a, t, magnitude in zip(same_dtype, self.truth, magnitudes, strict=True)
        ]

    def check(self, variant: Variant) -> Verdict:
        ours = _results(lambda o: variant.call(o, SEED), self.operands)
        worst, where = 0.0, ""
        for name, result, truth, limit in zip(("y", "dx", "dw", "db"), ours, self.truth, self.limits, strict=True):
            share = ((result.double() - truth).abs() / limit).nan_to_num(nan=float("inf")).max().item()
            if share >= worst:
                worst, where = share, name
        return Verdict(worst <= 1, worst, where)


def _results(layer: Callable[[Operands], Tensor], operands: Operands) -> Results:
    y = layer(operands)
    return (y.detach(), *torch.autograd.grad(y, operands.differentiable, operands.grad))  # type: ignore[return-value]
