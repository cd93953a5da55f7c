"""This backend's kernels as functions of tensors, from which ``gpu_linear`` puts y, dx, dw and db together."""

from __future__ import annotations

import torch
from torch import Tensor

from ...draws import Draw
from .. import gpu_linear
from . import primitives  # this module, as gpu_linear takes it
from .columns import gather_columns, scatter_columns
from .fused_linear import fused_input_gradient, fused_linear
from .launch import float32_precision
from .mask import keep_mask
from .mix import mix_into
from .weight_gradient import fused_weight_gradient

__all__ = [
    "fused_input_gradient",
    "fused_linear",
    "gather_columns",
    "keep_mask",
    "mix_into",
    "prefers_fused",
    "scatter_columns",
    "weight_gradient",
]


def prefers_fused(x: Tensor, weight: Tensor, target: Tensor | None) -> bool:
    # Without tensor cores a GEMM of float32 takes longer than reading Phi back, and the vendor's is the faster one.
    if x.dtype == torch.float32 and float32_precision() == "ieee":
        return False
    return x.shape[0] <= gpu_linear.FUSED_MAX_ROWS


def weight_gradient(
    g: Tensor, saved: Tensor, weight: Tensor, draw: Draw, scale: float, needs_db: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """dw like ``weight`` [out, in], and db [out] or empty; ``saved`` is x[:, kept] for a draw by column, else x."""
    if fused:
        return fused_weight_gradient(g, saved, weight, draw, scale, needs_db)
    dw = gpu_linear.staged_weight_gradient(primitives, g, saved, weight, draw, scale)
    return dw, g.sum(0) if needs_db else g.new_empty(0)
