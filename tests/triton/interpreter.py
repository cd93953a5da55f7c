"""What Triton's interpreter must be taught before these kernels can run in it (triton 3.6 to 3.9).

It converts float32 to bfloat16 by cutting off, where a GPU rounds to nearest even, and ``tl.dot`` multiplies the bit
patterns of bfloat16 operands as integers. Before 3.9 it also takes the bounds of a loop out of arrays with one element
by ``int``, which numpy has refused since 2.4.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Makes bfloat16 in the interpreter what it is on a GPU, and loops run with every numpy. Once per process."""
    if interpreter._convert_float is not _convert_float:
        interpreter._convert_float = _convert_float
        interpreter.InterpreterBuilder.create_dot = _create_dot
        interpreter._patch_lang_tensor = _patch_lang_tensor


_original_convert = interpreter._convert_float
_original_dot = interpreter.InterpreterBuilder.create_dot
_original_patch = interpreter._patch_lang_tensor


def _convert_float(data, from_dtype, to_dtype, rounding_mode):
    if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
        return _original_convert(data, from_dtype, to_dtype, rounding_mode)
    rounded = torch.from_numpy(np.array(data).view(np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _create_dot(builder, a, b, *arguments):
    return _original_dot(builder, _as_numbers(a), _as_numbers(b), *arguments)


def _patch_lang_tensor(tensor, *scope):
    _original_patch(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()  # the original's scope restores what was there before


def _as_numbers(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    numbers = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(numbers, tl.float32)
