"""C++ kernels for CPU tensors (csrc/cpu).

``schedule="fused"`` mixes inside the matrix product: float32, on CPUs with AVX-512. "staged" mixes in one vectorised
pass and leaves the product to the library behind ``F.linear``. Fused was the faster one from four rows on, wherever it
was measured (docs/performance.md), so it is what "auto" takes where it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..draws import Draw
from .contract import MixedWeight, WeightGradient

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_C: Any = _extension.load()[0]


def unavailable_reason() -> str | None:
    return _extension.load()[1] or None


def schedules(compute: torch.dtype) -> tuple[str, ...]:
    fused = compute == torch.float32 and _C.cpu_product_available()
    return ("fused", "staged") if fused else ("staged",)


def premixing_pays(compute: torch.dtype) -> bool:
    return "fused" not in schedules(compute)


def unsupported_reason(device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype) -> str | None:
    if device != "cpu":
        return f"the cpu backend takes tensors on the CPU, got device {device}"
    if weight not in _FLOATING:
        return f"the cpu backend takes float32, float64, bfloat16 and float16 weights, got {weight}"
    if target != weight and (weight, target) != (torch.float32, torch.bfloat16):
        return f"the cpu backend takes a target of the weight's dtype, or bfloat16 for float32, got {weight}, {target}"
    if compute != weight and not (weight == torch.float32 and compute in (torch.bfloat16, torch.float16)):
        return f"the cpu backend computes in the weight's dtype, or casts float32 down, got {weight} to {compute}"
    return None


def keep_mask(draw: Draw, shape: Sequence[int]) -> Tensor:
    return _C.cpu_keep_mask(draw.seed, draw.p, max(1, _numel(shape))).view(*shape)


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _per_weight(draw: Draw) -> bool:
    if draw.by_column or (len(draw.strides) > 2 and draw.strides[0] == 0):
        return False
    if draw.strides[0] == 0 or draw.strides[-1] == 0:
        raise NotImplementedError(draw.strides)
    return True


def mixout(weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
    return _C.cpu_mixout(weight, target, draw.seed, draw.p, factor, _per_weight(draw))


def mixout_list(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    draws: Sequence[Draw],
) -> None:
    for out, weight, target, draw in zip(outs, weights, targets, draws, strict=True):
        _C.cpu_mixout_list([out], [weight], [target], draw.seed, draw.p, _per_weight(draw))


def _operand(phi: MixedWeight, q: float, dtype: torch.dtype) -> Tensor | None:
    if phi.operand is not None or phi.draw.p == q:
        return phi.operand
    out = torch.empty_like(phi.weight, dtype=dtype)
    mixout_list([out], [phi.weight], [phi.target], [phi.draw])
    return out


def mix_linear(
    input: Tensor, phi: MixedWeight, bias: Tensor | None, gradient: WeightGradient, schedule: str
) -> tuple[Tensor, Tensor]:
    mixed, draw = _operand(phi, gradient.draw.p, input.dtype), gradient.draw
    fused = _is_fused(schedule, input.dtype)
    return _C.cpu_mix_linear(
        input, phi.weight, phi.target, bias, draw.seed, draw.p, _per_weight(draw), gradient.width, mixed, fused
    )


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    phi: MixedWeight,
    gradient: WeightGradient,
    needs: tuple[bool, bool, bool],
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mixed, draw = _operand(phi, gradient.draw.p, grad.dtype), gradient.draw
    return _C.cpu_mix_linear_backward(
        grad, saved_input, phi.weight, phi.target, draw.seed, draw.p, gradient.scale, _per_weight(draw), needs, mixed,
        _is_fused(schedule, grad.dtype),
    )  # fmt: skip


def _is_fused(schedule: str, compute: torch.dtype) -> bool:
    return schedule != "staged" and "fused" in schedules(compute)
