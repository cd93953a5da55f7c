"""Linear layers of which the same columns of the weight train in every step: torch's own products, of less.

What a draw keeps changes in every step, and its kernels find it by its seed. A fixed choice is a tensor of indices, for
which ``index_select`` and ``index_copy_`` are all that is needed, on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks
from .functional import autocast_enabled, compute_dtype


def fixed_columns_linear(input: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """``F.linear`` whose dw has these columns alone, of ``x[:, columns]``, which is all that is saved of x.

    .. code-block:: text

        y = x W^T + b       dx = g W       dw[:, columns] = g^T x[:, columns], 0 elsewhere       db = sum g

    Args:
        input: ``[..., in]``; under autocast it is cast, and dw comes back in the weight's dtype.
        weight: ``[out, in]``. bias: ``[out]`` or None.
        columns: int64 ``[n]``, ascending, on the weight's device.

    Raises:
        ValueError, TypeError: for tensors that do not fit, as :func:`mixout_kernels.mix_linear`.
    """
    checks.linear("fixed_columns_linear", input, weight, bias, autocast_enabled)
    dtype = compute_dtype(input)
    return _FixedColumns.apply(input.to(dtype), weight, None if bias is None else bias.to(dtype), columns)


def training_columns(weight: Tensor, columns: Tensor) -> Tensor:
    """The weight ``[out, in]``, whose gradient reaches these columns alone: for a layer that mixes it, too."""
    return _TrainingColumns.apply(weight, columns)


class _FixedColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        saved = rows.index_select(1, columns) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(saved, weight, columns)
        y = F.linear(rows, weight.to(input.dtype), bias)
        # Autograd forbids in-place operations on a Function's view.
        return torch.ops.aten._unsafe_view(y, [*input.shape[:-1], weight.shape[0]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight, columns = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1])
        if saved is not None:
            dw = torch.zeros_like(weight).index_copy_(1, columns, (rows.t() @ saved).to(weight.dtype))
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None


class _TrainingColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        return torch.zeros_like(grad).index_copy(1, columns, grad.index_select(1, columns)), None
