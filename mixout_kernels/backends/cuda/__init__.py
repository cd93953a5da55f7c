"""CUDA C++ kernels (csrc/cuda) for compute capability 8.0 and later.

``schedule="fused"`` mixes inside the GEMM, on tensor cores for bfloat16 and float16 inputs; "staged" mixes in a kernel
of its own and leaves the GEMM to the vendor library. With ``MIXOUT_KERNELS_CUDA_EMULATION=1`` the same kernel sources,
compiled for the host (tests/cuda/emulation.py), run on CPU tensors.

primitives.py    the kernels as functions of tensors, from which ``gpu_linear`` puts a linear layer together
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _extension
from .. import gpu_linear
from ..contract import FusedRule, LinearCall, LinearPlan, MixedWeight, WeightGradient
from . import primitives
from .primitives import EMULATED, EXTENSION, TYPES
from .primitives import keep_mask as keep_mask
from .primitives import mixer as mixer
from .primitives import mixout as mixout
from .primitives import mixout_list as mixout_list

_DEVICE = "cpu" if EMULATED else "cuda"
_C: Any = _extension.load()[0]  # without it (MIXOUT_KERNELS_CPU=0) the layer is recorded in Python
_MINIMUM_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    reason = _extension.load(EXTENSION)[1]
    if reason or EMULATED:
        return reason or None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _MINIMUM_CAPABILITY:
        return (
            f"the cuda backend needs compute capability 8.0 or later, this device has {'.'.join(map(str, capability))}"
        )
    return None


def unsupported_reason(device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype) -> str | None:
    if device != _DEVICE:
        return f"the cuda backend takes tensors on {_DEVICE}, got device {device}"
    if weight not in TYPES:
        return f"the cuda backend takes float32, bfloat16 and float16 weights, got {weight}"
    if target != weight and (weight, target) != (torch.float32, torch.bfloat16):
        return (
            f"the cuda backend takes a target of the weight's dtype, or bfloat16 for float32, got {target} for {weight}"
        )
    if compute != weight and not (weight == torch.float32 and compute in TYPES):
        return f"the cuda backend computes in the weight's dtype, or casts float32 down, got {weight} to {compute}"
    return None


def schedules(compute: torch.dtype) -> tuple[str, ...]:
    return "fused", "staged"


def premixing_pays(compute: torch.dtype) -> bool:
    return True  # one launch for a model in place of two for each layer, and of autocast's casts


def mix_linear(
    input: Tensor, phi: MixedWeight, bias: Tensor | None, gradient: WeightGradient, schedule: str
) -> tuple[Tensor, Tensor]:
    return gpu_linear.mix_linear(primitives, input, phi, bias, gradient, schedule)


def linear_plan(call: LinearCall) -> LinearPlan | None:
    """In C++ (csrc/gpu): the operations of ``gpu_linear``, one by one, at a fraction of Python's time for them."""
    if _C is None:
        return None
    # An operand leaves nothing to fuse.
    rule = FusedRule.of(call.schedule, primitives.fused_rule(call.compute))._replace(rows_with_operand=0)
    plan: LinearPlan = _C.GpuPlan(call, rule, *primitives.launchers_and_stream(), EMULATED)
    return plan


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    phi: MixedWeight,
    gradient: WeightGradient,
    needs: tuple[bool, bool, bool],
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return gpu_linear.mix_linear_backward(primitives, grad, saved_input, phi, gradient, needs, schedule)
