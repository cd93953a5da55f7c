"""C++ kernels for CPU tensors (csrc/cpu).

``schedule="fused"`` mixes inside the matrix product: float32, on CPUs with AVX-512. "staged" mixes in one vectorised
pass and leaves the product to the library behind ``F.linear``. Fused was the faster one from four rows on, wherever it
was measured (docs/performance.md), so it is what "auto" takes where it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension

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


def keep_mask(seed: Tensor, p: float, shape: Sequence[int], mask: str) -> Tensor:
    if mask == "neuron" and len(shape) > 1:
        return _C.cpu_keep_mask(seed, p, shape[1])
    return _C.cpu_keep_mask(seed, p, math.prod(shape)).view(*shape)


def mixout(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, scale: float, mask: str) -> Tensor:
    return _C.cpu_mixout(weight, target, seed, p, scale, mask == "weight")


def mixout_list(
    outs: list[Tensor],
    weights: list[Tensor],
    targets: list[Tensor | None],
    seeds: Tensor,
    p: float,
    mask: str,
) -> None:
    _C.cpu_mixout_list(outs, weights, targets, seeds, p, mask == "weight")


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    saved_columns: int | None,
    schedule: str,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    fused = _is_fused(schedule, p, input.dtype)
    return _C.cpu_mix_linear(input, weight, target, bias, seed, p, mask == "weight", saved_columns, mixed, fused)


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    p: float,
    scale: float,
    mask: str,
    needs: Sequence[bool],
    schedule: str,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _C.cpu_mix_linear_backward(
        grad,
        saved_input,
        weight,
        target,
        seed,
        p,
        scale,
        mask == "weight",
        tuple(needs),
        mixed,
        _is_fused(schedule, p, grad.dtype),
    )


def _is_fused(schedule: str, p: float, compute: torch.dtype) -> bool:
    # p = 1 mixes nothing, and is F.linear(x, u, b) bit for bit.
    return schedule != "staged" and p < 1 and "fused" in schedules(compute)
