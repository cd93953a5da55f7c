"""The check of this package's layers against the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common.agreement import Verdict, compare
from mixout_kernels import reference

from .cases import Operands
from .layers import Call, Layer, Mix

SEED = 20200427


class Expected:
    """y, dx, dw and db of the reference, in the layer's dtype and in float64."""

    def __init__(self, operands: Operands, mix: Mix) -> None:
        def layer(o: Operands) -> Tensor:
            return reference.mix_linear(o.x, o.weight, mix.target_of(o), o.bias, **mix.options, seed=SEED)

        self.operands = operands
        self.same_dtype = _results(layer, operands)
        self.truth = _results(layer, operands.double())

    def check(self, layer: Layer) -> Verdict:
        return compare(_results(lambda o: layer.call(o, SEED), self.operands), self.same_dtype, self.truth)


def _results(call: Call, operands: Operands) -> dict[str, Tensor]:
    y = call(operands)
    gradients = torch.autograd.grad(y, operands.differentiable, operands.grad)
    return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *gradients), strict=True))
