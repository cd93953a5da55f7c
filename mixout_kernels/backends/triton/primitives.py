"""This backend's kernels as functions of tensors, from which ``gpu_linear`` puts y, dx, dw and db together."""

from __future__ import annotations

import torch
from torch import Tensor

from ...draws import Draw
from .. import gpu_linear
from .columns import gather_columns, scatter_columns
from .fused_linear import fused_input_gradient, fused_linear
from .launch import float32_precision
from .mask import keep_mask
from .mix import mix_into
from .weight_gradient import fused_weight_gradient

__all__ = [
    "fused_input_gradient",
    "fused_linear",
    "fused_weight_gradient",
    "gather_columns",
    "keep_mask",
    "mix_into",
    "prefers_fused",
    "scatter_columns",
    "scatter_columns_and_sum",
]


def scatter_columns_and_sum(compact: Tensor, out: Tensor, draw: Draw, scale: float, g: Tensor) -> Tensor:
    scatter_columns(compact, out, draw, scale)
    return g.sum(0)


def prefers_fused(x: Tensor, weight: Tensor, target: Tensor | None) -> bool:
    # Without tensor cores a GEMM of float32 takes longer than reading Phi back, and the vendor's is the faster one.
    if x.dtype == torch.float32 and float32_precision() == "ieee":
        return False
    return x.numel() // x.shape[-1] <= gpu_linear.FUSED_MAX_ROWS
