"""y = x Phi^T + b and its derivatives, by one of two schedules.

fused     mask, mix and product in one kernel, Phi never written: one launch forward, two backward
staged    Phi in one pass, then the vendor's product; dw is a product of the kept columns alone. With target None
          Phi has only the kept columns, and then all three products do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .columns import gather_columns, scatter_columns
from .fused_linear import fused_input_gradient, fused_linear
from .launch import float32_precision
from .mask import keep_mask
from .mix import mix_into
from .weight_gradient import weight_gradient


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
    x = _rows(input)
    per_weight = mask == "weight"
    if saved_columns is None:  # only for tensors on the CPU, whose mask the host can read
        saved_columns = 0 if per_weight else int(keep_mask(seed, p, weight.shape, mask).sum())
    if p == 1 or x.numel() == 0 or weight.numel() == 0:
        y, kept = F.linear(x, _nothing_kept(weight, target, x.dtype), bias), x.new_zeros((x.shape[0], saved_columns))
    elif mixed is None and _schedule(x, schedule) == "fused":
        y, kept = fused_linear(x, weight, target, bias, seed, p, per_weight, saved_columns)
    else:
        kept = gather_columns(x, seed, p, saved_columns)
        if mixed is None:
            mixed = _mixed_weight(weight, target, seed, p, per_weight, x.dtype)
        y = F.linear(x, mixed, bias)
    return torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], weight.shape[0])), kept


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
    g = _rows(grad)
    per_weight = mask == "weight"
    needs_dx, needs_dw, needs_db = needs
    nothing_kept = p == 1 or g.numel() == 0 or weight.numel() == 0
    fused = not nothing_kept and _schedule(g, schedule) == "fused"
    dx, dw, db = g.new_empty(0), weight.new_empty(0), g.new_empty(0)
    if needs_dx:
        if nothing_kept:
            dx = torch.mm(g, _nothing_kept(weight, target, g.dtype))
        elif mixed is not None:
            dx = torch.mm(g, mixed)
        elif fused:
            dx = fused_input_gradient(g, weight, target, seed, p, per_weight)
        else:
            dx = torch.mm(g, _mixed_weight(weight, target, seed, p, per_weight, g.dtype))
        dx = dx.view(*grad.shape[:-1], weight.shape[1])
    if needs_dw:
        if nothing_kept:
            dw = torch.zeros_like(weight)
        elif fused:
            dw, db = weight_gradient(g, _rows(saved_input), weight, seed, p, scale, per_weight, needs_db)
        else:
            dw = _staged_weight_gradient(g, _rows(saved_input), weight, seed, p, scale, per_weight)
    if needs_db and not (fused and needs_dw):
        db = g.sum(0)
    return dx, dw, db


def _schedule(x: Tensor, schedule: str) -> str:
    # Without tensor cores a product of float32 takes longer than reading Phi back, and the vendor's is the faster one.
    if schedule == "auto" and x.dtype == torch.float32 and float32_precision() == "ieee":
        return "staged"
    return schedule


def _rows(x: Tensor) -> Tensor:
    """[rows, features], each row contiguous."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _nothing_kept(weight: Tensor, target: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(weight, dtype=dtype) if target is None else target.to(dtype)


def _mixed_weight(
    weight: Tensor, target: Tensor | None, seed: Tensor, p: float, per_weight: bool, dtype: torch.dtype
) -> Tensor:
    phi = torch.empty_like(weight, dtype=dtype)
    return mix_into(phi, weight, target, seed, p, 1 / (1 - p), per_weight)


def _staged_weight_gradient(
    g: Tensor, x: Tensor, weight: Tensor, seed: Tensor, p: float, scale: float, per_weight: bool
) -> Tensor:
    dw = torch.empty_like(weight)
    # In the memory order of dw, so that the pass over it reads and writes along rows.
    product = torch.mm(x.t(), g).t() if dw.stride(0) == 1 else torch.mm(g.t(), x)
    if not per_weight:
        return scatter_columns(product, dw, seed, p, scale)
    if product.dtype == dw.dtype and product.stride() == dw.stride():
        dw = product
    return mix_into(dw, product, None, seed, p, scale, per_weight)
