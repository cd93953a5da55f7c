"""Does a variant compute what the reference computes? A speed-up with a wrong result is none.

    |ours - truth| <=  2 |reference - truth| +  4 eps |truth|        a tensor, or the gradient of a whole model
    |ours - truth| <= 16 |reference - truth| + 64 eps |truth|        the gradient of one parameter of a model

Norms are 2-norms. ``reference`` is ``mixout_kernels.reference`` in the same precision, ``truth`` in float64; all three
under the same masks. eps is float32's in any precision: what a lower one costs, the reference's error has in it.

The bias of a head has two numbers, hence two rounding errors, and the reference's are far below their size now and
then: the quotient of two normal variables passes 2 three times in ten. Summed over a model, chance is gone. A step in
float32 that scales dw by 1.001 fails, one under bfloat16 autocast that scales it by 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps
_Norms = tuple[float, float, float]  # |ours - truth|, |reference - truth|, |truth|


@dataclass(frozen=True)
class Verdict:
    worst: float  # the largest error over its limit; infinite for a result that is not finite
    where: str

    @property
    def matches(self) -> bool:
        return self.worst <= 1


def compare(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Verdict:
    """Judge each tensor by itself."""
    norms = {name: _norms(ours[name], reference[name], truth[name]) for name in truth}
    return _worst({name: _share(*row, factor=2, slack=4) for name, row in norms.items()})


def compare_model(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Verdict:
    """Judge the gradients of a model: all of them together, and each parameter's more loosely."""
    norms = {name: _norms(ours[name], reference[name], truth[name]) for name in truth}
    whole = [math.hypot(*column) for column in zip(*norms.values(), strict=True)]
    parts = {name: _share(*row, factor=16, slack=64) for name, row in norms.items()}
    return _worst({"all gradients": _share(*whole, factor=2, slack=4), **parts})


def _norms(ours: Tensor, reference: Tensor, truth: Tensor) -> _Norms:
    truth = truth.double()
    return (ours - truth).norm().item(), (reference - truth).norm().item(), truth.norm().item()


def _share(error: float, reference_error: float, size: float, *, factor: float, slack: float) -> float:
    if not math.isfinite(error):
        return math.inf
    limit = factor * reference_error + slack * _EPS * size
    return 0.0 if error == 0 else error / limit if limit else math.inf


def _worst(shares: Mapping[str, float]) -> Verdict:
    where = max(shares, key=lambda name: shares[name])
    return Verdict(shares[where], where)
