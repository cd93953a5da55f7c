"""y = x Phi^T + b and its derivatives, by the schedules of ``gpu_linear``."""

from __future__ import annotations

from torch import Tensor

from .. import gpu_linear
from ..contract import LinearCall, MixedWeight, WeightGradient
from . import primitives


def mix_linear(
    input: Tensor, phi: MixedWeight, bias: Tensor | None, gradient: WeightGradient, schedule: str
) -> tuple[Tensor, Tensor]:
    return gpu_linear.mix_linear(primitives, input, phi, bias, gradient, schedule)


def linear_plan(call: LinearCall) -> None:
    """None: Triton's kernels are started by Python, not by C++."""


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    phi: MixedWeight,
    gradient: WeightGradient,
    needs: tuple[bool, bool, bool],
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return gpu_linear.mix_linear_backward(primitives, grad, saved_input, phi, gradient, needs, schedule)
