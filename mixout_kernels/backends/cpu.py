"""C++ kernels for CPU tensors (csrc/cpu).

``schedule="fused"`` mixes inside the GEMM: float32, on CPUs with AVX-512. "staged" mixes in one vectorised pass and
leaves the GEMM to the library behind ``F.linear``. What "auto" takes is measured (docs/performance.md):

    the library does not use AVX-512 (MKL on AMD's CPUs)   fused: its GEMM is twice as fast
    it does (MKL on Intel's CPUs)                          fused below 256 rows, where mixing costs as much as the GEMM;
                                                           staged from there on, and where nothing is to be mixed
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
_HAS_PRODUCT = _C is not None and _C.cpu_product_available()
_LIBRARY_USES_AVX512 = _C is not None and _C.cpu_library_uses_avx512()
_STAGED_FROM_ROWS = 256


def unavailable_reason() -> str | None:
    return _extension.load()[1] or None


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


def schedules(compute: torch.dtype) -> tuple[str, ...]:
    return ("fused", "staged") if compute == torch.float32 and _HAS_PRODUCT else ("staged",)


def premixing_pays(compute: torch.dtype) -> bool:
    return "fused" not in schedules(compute) or _LIBRARY_USES_AVX512


def keep_mask(draw: Draw, shape: Sequence[int]) -> Tensor:
    return _C.cpu_keep_mask(draw, draw.layout(shape)).view(tuple(shape))


def mixout(weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
    return _C.cpu_mixout(weight, target, draw, draw.layout(weight.shape), factor)


def mixout_list(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    draws: Sequence[Draw],
) -> None:
    _C.cpu_mixout_list(outs, weights, targets, draws)


def mix_linear(
    input: Tensor, phi: MixedWeight, bias: Tensor | None, gradient: WeightGradient, schedule: str
) -> tuple[Tensor, Tensor]:
    return _C.cpu_mix_linear(input, phi, bias, gradient, _is_fused(schedule, input, phi))


def recorded_linear(
    input: Tensor,
    phi: MixedWeight,
    bias: Tensor | None,
    kept_input: Tensor | None,
    gradient: WeightGradient,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    return _C.cpu_recorded_linear(input, phi, bias, kept_input, gradient, _is_fused(schedule, input, phi))


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    phi: MixedWeight,
    gradient: WeightGradient,
    needs: tuple[bool, bool, bool],
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _C.cpu_mix_linear_backward(grad, saved_input, phi, gradient, needs, _is_fused(schedule, grad, phi))


def _is_fused(schedule: str, left: Tensor, phi: MixedWeight) -> bool:
    """Whether to fuse, for the input or the gradient ``left`` ``[..., features]``: both have the same rows."""
    if schedule != "auto":
        return schedule == "fused"
    if left.dtype != torch.float32 or not _HAS_PRODUCT:
        return False
    return not _LIBRARY_USES_AVX512 or (phi.operand is None and left.numel() < _STAGED_FROM_ROWS * left.shape[-1])
