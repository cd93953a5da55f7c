"""Triton kernels for NVIDIA GPUs; with TRITON_INTERPRET=1 they run, slowly and exactly, on CPU tensors.

mask.py              the decisions of a draw, regenerated from its seed, and the patterns that kernels are compiled for
mix.py, mix_list.py  Phi in one pass, for one weight and for many
columns.py           the kept columns gathered to a fixed width, and scattered back
fused_linear.py      y and dx with the mask and the mix inside the GEMM
weight_gradient.py   dw and db for the same schedule
primitives.py        all of these, as ``gpu_linear`` takes them; linear.py hands them over
launch.py            what every launch needs to know of the device
"""

from __future__ import annotations

import functools

import torch

try:
    import triton  # noqa: F401
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None
    # Named twice: they are this module's own, as the contract wants them.
    from .launch import interpreted
    from .linear import linear_plan as linear_plan
    from .linear import mix_linear as mix_linear
    from .linear import mix_linear_backward as mix_linear_backward
    from .mask import keep_mask as keep_mask
    from .mix import mixout as mixout
    from .mix_list import mixer as mixer
    from .mix_list import mixout_list as mixout_list

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason() -> str | None:
    if _import_error is not None:
        return f"triton could not be imported ({_import_error}); pip install triton"
    return None


def schedules(compute: torch.dtype) -> tuple[str, ...]:
    return "fused", "staged"


def premixing_pays(compute: torch.dtype) -> bool:
    return True  # one launch for a model in place of two for each layer, and of autocast's casts


def unsupported_reason(device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype) -> str | None:
    if device == "cpu" and not interpreted():
        return "the triton backend takes tensors on the CPU only with TRITON_INTERPRET=1 in the environment"
    if device not in ("cpu", "cuda"):
        return f"the triton backend takes tensors on cuda, got device {device}"
    for name, dtype in (("weight", weight), ("target", target), ("input", compute)):
        if dtype not in _FLOATING:
            return f"the triton backend takes float32, bfloat16 and float16, got {name} {dtype}"
    return _unsupported_gpu() if device == "cuda" else None


@functools.cache
def _unsupported_gpu() -> str | None:
    if torch.version.hip is not None:
        return "the triton backend's tiles are checked for NVIDIA GPUs only, and this is a ROCm build of torch"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (
            f"the triton backend takes GPUs of compute capability 8.0 and above, got {'.'.join(map(str, capability))}"
        )
    return None
