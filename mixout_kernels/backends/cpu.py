"""C++ kernels for CPU tensors (csrc/cpu).

``schedule="fused"`` mixes inside the GEMM: float32 on CPUs with AVX2, float16 on those with AVX-512, bfloat16 on those
with AVX512_BF16 or AMX. "staged" mixes in one vectorised pass and leaves the GEMM to the library behind ``F.linear``.
What "auto" takes is measured (docs/performance.md):

    float32   the library is MKL, on a CPU of Intel's                fused below 256 rows, where mixing costs as much
                                                                     as the GEMM; staged from there on, and where
                                                                     nothing is to be mixed
              any other, which MKL serves by AVX2 alone              fused: its GEMM is as fast with AVX2, and up to
                                                                     twice as fast with AVX-512
    bfloat16  AVX512_BF16 (vdpbf16ps)                                fused
              AMX                                                    fused below 2048 rows
    float16   the library has no instruction for it                  fused: widened while packed, summed in float32
              it has (AVX512_FP16, AVX_NE_CONVERT)                   staged

Without such an instruction torch multiplies float16 by a loop, which took 10 to 50 times as long as float32: staged,
too, the library is then given float32.

``torch.set_float32_matmul_precision("medium")`` and ``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` let oneDNN
round the operands of a float32 product to bfloat16, which it does with AMX and without it never. A fused product then
does the same, and "auto" follows the rule of bfloat16. What is set counts in forward and in backward by itself, as for
``F.linear``.

``ONEDNN_MAX_CPU_ISA``, which holds the library to older instructions, holds our GEMMs to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..draws import Draw
from .contract import ALL_ROWS, FusedRule, LinearCall, LinearPlan, MixedWeight, WeightGradient

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_C: Any = _extension.load()[0]
_HAS_PRODUCT = _C is not None and _C.cpu_product_vectors() != "none"
_BF16_UNIT = "none" if _C is None else _C.cpu_bf16_unit()  # or "dot" (vdpbf16ps), or "tiles" (AMX)
_HAS_F16_PRODUCT = _C is not None and _C.cpu_f16_product_available()
_LIBRARY_MULTIPLIES_F16 = _C is not None and _C.cpu_library_multiplies_f16()
_LIBRARY_IS_FASTER = _C is not None and _C.cpu_library_is_faster()
_STAGED_FROM_ROWS = 256
_STAGED_FROM_ROWS_WITH_AMX = 2048


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
    fused = {torch.float32: _HAS_PRODUCT, torch.bfloat16: _BF16_UNIT != "none", torch.float16: _HAS_F16_PRODUCT}
    return ("fused", "staged") if fused.get(compute) else ("staged",)


def premixing_pays(compute: torch.dtype) -> bool:
    # Where multiplying takes longer than reading w and u, the fused GEMM mixes at next to no cost. In bfloat16 it does
    # not: on Zen 4 a pass packs Phi in 0.4 to 0.9 ms and multiplies in 2.8, at 512 rows and 384 x 1536.
    fast = {torch.bfloat16: True, torch.float16: _LIBRARY_MULTIPLIES_F16}
    return "fused" not in schedules(compute) or fast.get(compute, _LIBRARY_IS_FASTER)


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


def mixer(
    outs: Sequence[Tensor], weights: Sequence[Tensor], targets: Sequence[Tensor | None], draws: Sequence[Draw]
) -> Callable[[], None]:
    return lambda: mixout_list(outs, weights, targets, draws)


def mix_linear(
    input: Tensor, phi: MixedWeight, bias: Tensor | None, gradient: WeightGradient, schedule: str
) -> tuple[Tensor, Tensor]:
    return _C.cpu_mix_linear(input, phi, bias, gradient, _is_fused(schedule, input, phi), _may_round())


def linear_plan(call: LinearCall) -> LinearPlan:
    rules = _fused_rule(call.schedule, call.compute), _fused_rule(call.schedule, call.compute, rounded=True)
    plan: LinearPlan = _C.CpuPlan(call, *rules, _may_round())
    return plan


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    phi: MixedWeight,
    gradient: WeightGradient,
    needs: tuple[bool, bool, bool],
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fused = _is_fused(schedule, grad, phi)
    return _C.cpu_mix_linear_backward(grad, saved_input, phi, gradient, needs, fused, _may_round())


def _is_fused(schedule: str, left: Tensor, phi: MixedWeight) -> bool:
    """Whether to fuse, for the input or the gradient ``left`` ``[..., features]``: both have the same rows."""
    rounded = _may_round() and _C.cpu_float32_may_be_rounded()
    rule = _fused_rule(schedule, left.dtype, rounded)
    rows = rule.rows if phi.operand is None else rule.rows_with_operand
    return left.numel() < rows * left.shape[-1]


def _fused_rule(schedule: str, compute: torch.dtype, rounded: bool = False) -> FusedRule:
    """``rounded``: float32 is rounded to bfloat16, of which products then are."""
    if "fused" not in schedules(compute):
        return FusedRule(0, 0)
    rows = rows_with_operand = ALL_ROWS
    if compute == torch.bfloat16 or (compute == torch.float32 and rounded):
        rows = rows_with_operand = ALL_ROWS if _BF16_UNIT == "dot" else _STAGED_FROM_ROWS_WITH_AMX
    elif compute == torch.float16:
        rows = rows_with_operand = 0 if _LIBRARY_MULTIPLIES_F16 else ALL_ROWS
    elif _LIBRARY_IS_FASTER:
        rows, rows_with_operand = _STAGED_FROM_ROWS, 0
    return FusedRule.of(schedule, FusedRule(rows, rows_with_operand))


def _may_round() -> bool:
    """Whether the library rounds float32 to bfloat16 where torch's switch allows it."""
    return _BF16_UNIT == "tiles"
