"""What every launch of this backend has in common."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# Registers of a thread. Without a bound ptxas aims at an occupancy of its own choice, and spilled up to six registers
# to reach it. A pass over memory has 4 warps and enough bytes under way with four blocks on an SM; the block of a GEMM
# has most of the shared memory, and may have the registers too.
MOST_REGISTERS_OF_A_PASS = 128
MOST_REGISTERS_OF_A_GEMM = 255
# The smallest shared memory of a block on the GPUs this backend supports (compute capability 8.6).
_LEAST_SHARED_MEMORY = 99 * 1024


def interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors here; it decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(
    kernel: Any, programs: int, tensor: Tensor, *arguments: Any, maxnreg: int = MOST_REGISTERS_OF_A_PASS, **options: Any
) -> None:
    """Runs ``kernel`` on the device of its first argument."""
    # Without contraction to fused multiply-adds Phi equals the plain formula's bit for bit, in every backend. Products
    # on tensor cores are not affected, and the kernels that only mix wait for memory.
    with _current_device(tensor):
        kernel[(programs,)](tensor, *arguments, **options, maxnreg=maxnreg, enable_fp_fusion=False)


def _current_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block can have."""
    if device.type != "cuda":
        return _LEAST_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def float32_precision() -> str:
    """Triton's name for how torch multiplies float32 matrices on a GPU."""
    switch = torch.backends.cuda.matmul
    # allow_tf32 raises once the user has set fp32_precision, which torch has had since 2.9 and which follows both.
    tf32 = switch.fp32_precision == "tf32" if hasattr(switch, "fp32_precision") else switch.allow_tf32
    return "tf32" if tf32 else "ieee"
