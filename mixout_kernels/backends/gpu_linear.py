"""y = x Phi^T + b and its derivatives on a GPU, put together once from the primitives of a backend.

fused     mask, mix and GEMM in one kernel, Phi never in memory
staged    Phi in one pass, then the vendor's GEMM; dw is a GEMM over the kept columns alone

An operand that the caller has already leaves nothing to mix, so both schedules then read it with the vendor's GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draws import Draw
from .contract import MixedWeight, WeightGradient

# Rows up to which the fused schedule is chosen. Reading w and u once costs 2 * N * K * b bytes in both schedules; the
# staged one also writes and reads Phi (2 * N * K * b more) and launches once more. That is what a product with few
# rows is made of, while with many rows the vendor GEMM's higher throughput outweighs it: at 4.3 TB/s and 700 TFLOP/s
# in bf16 the product takes longer than the bytes of w and u from about 320 rows on. Arithmetic, not yet a measurement.
FUSED_MAX_ROWS = 256


class Primitives(Protocol):
    """What a GPU backend provides. Matrices of activations have contiguous rows; every draw has a p below 1."""

    def keep_mask(self, draw: Draw, shape: Sequence[int]) -> Tensor:
        """As :meth:`contract.Backend.keep_mask`."""

    def mix_into(self, out: Tensor, weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
        """Writes ``where(keep, u + (w - u) * factor, u)`` of a 2-D weight in any layout; ``out`` may be ``weight``."""

    def gather_columns(self, x: Tensor, draw: Draw, width: int) -> Tensor:
        """x[:, kept] ``[rows, width]`` of x ``[rows, in]``: zeros past the kept columns, those past width left out."""

    def scatter_columns(self, compact: Tensor, out: Tensor, draw: Draw, scale: float) -> Tensor:
        """Writes ``scale * compact`` into the kept columns of ``out`` (either dense layout), zeros elsewhere."""

    def scatter_columns_and_sum(self, compact: Tensor, out: Tensor, draw: Draw, scale: float, g: Tensor) -> Tensor:
        """``scatter_columns``, and db = sum g ``[rows of out]``, which may be taken in the same launch."""

    def prefers_fused(self, x: Tensor, weight: Tensor, target: Tensor | None) -> bool:
        """What schedule "auto" takes for these, x being ``[..., features]``."""

    def fused_linear(
        self,
        x: Tensor,
        weight: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        draw: Draw,
        gather: Draw,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """y ``[rows, out]``, and x[:, kept] by ``gather`` (empty for a width of 0)."""

    def fused_input_gradient(self, g: Tensor, weight: Tensor, target: Tensor | None, draw: Draw) -> Tensor:
        """dx ``[rows, in]`` = g Phi."""

    def fused_weight_gradient(
        self, g: Tensor, saved: Tensor, weight: Tensor, draw: Draw, scale: float, needs_db: bool
    ) -> tuple[Tensor, Tensor] | None:
        """dw, in the weight's dtype and layout, and db ``[out]`` (empty unless asked for); None without such a kernel.

        ``saved`` is x[:, kept] for a draw by column, else x.
        """


def mix_linear(
    primitives: Primitives,
    input: Tensor,
    phi: MixedWeight,
    bias: Tensor | None,
    gradient: WeightGradient,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    x = _rows(input)
    weight, target, operand, draw = phi
    width = saved_width(primitives, weight, gradient)
    if operand is None and is_fused(primitives, x, weight, target, schedule):
        y, kept = primitives.fused_linear(x, weight, target, bias, draw, gradient.draw, width)
    else:
        if operand is None:
            operand = _mixed(primitives, phi, x.dtype)
        y = F.linear(x, operand, bias)
        kept = primitives.gather_columns(x, gradient.draw, width) if width else x.new_empty((x.shape[0], 0))
    return torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], weight.shape[0])), kept


def mix_linear_backward(
    primitives: Primitives,
    grad: Tensor,
    saved_input: Tensor,
    phi: MixedWeight,
    gradient: WeightGradient,
    needs: tuple[bool, bool, bool],
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    g = _rows(grad)
    weight, target, operand, draw = phi
    needs_dx, needs_dw, needs_db = needs
    dx, dw, db = grad.new_empty(0), weight.new_empty(0), grad.new_empty(0)
    fused = is_fused(primitives, g, weight, target, schedule)
    if needs_dx:
        if operand is None and fused:
            dx = primitives.fused_input_gradient(g, weight, target, draw)
        else:
            dx = torch.mm(g, _mixed(primitives, phi, g.dtype) if operand is None else operand)
        dx = dx.view(*grad.shape[:-1], weight.shape[1])
    if needs_dw:
        saved = _rows(saved_input)
        _check_width(saved, weight, gradient)
        wanted = g, saved, weight, gradient.draw, gradient.scale, needs_db
        if fused and (both := primitives.fused_weight_gradient(*wanted)) is not None:
            return dx, *both
        return dx, *_staged_weight_gradient(primitives, *wanted)
    if needs_db:
        db = g.sum(0)
    return dx, dw, db


def is_fused(primitives: Primitives, x: Tensor, weight: Tensor, target: Tensor | None, schedule: str) -> bool:
    return primitives.prefers_fused(x, weight, target) if schedule == "auto" else schedule == "fused"


def saved_width(primitives: Primitives, weight: Tensor, gradient: WeightGradient) -> int:
    """The columns of x[:, kept]. None, exactly the kept ones, comes on the CPU alone, where masks can be read."""
    if gradient.width is not None:
        return gradient.width
    return int(primitives.keep_mask(gradient.draw, (1, weight.shape[1])).sum())


def _staged_weight_gradient(
    primitives: Primitives, g: Tensor, saved: Tensor, weight: Tensor, draw: Draw, scale: float, needs_db: bool
) -> tuple[Tensor, Tensor]:
    """dw by the vendor's GEMM and one pass over it, in the memory order of the weight; and db, or empty."""
    dw = torch.empty_like(weight)
    # [in or kept, out] where dw lies so: the pass over it then reads and writes along rows.
    product = torch.mm(saved.t(), g).t() if dw.stride(0) == 1 and dw.shape[1] > 1 else torch.mm(g.t(), saved)
    if draw.by_column:
        if needs_db:
            return dw, primitives.scatter_columns_and_sum(product, dw, draw, scale, g)
        return primitives.scatter_columns(product, dw, draw, scale), g.new_empty(0)
    if product.dtype == dw.dtype and product.stride() == dw.stride():
        dw = product
    return primitives.mix_into(dw, product, None, draw, scale), g.sum(0) if needs_db else g.new_empty(0)


def _mixed(primitives: Primitives, phi: MixedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(phi.weight, dtype=dtype)
    return primitives.mix_into(out, phi.weight, phi.target, phi.draw, phi.draw.scale)


def _check_width(saved: Tensor, weight: Tensor, gradient: WeightGradient) -> None:
    expected = gradient.width if gradient.draw.by_column else weight.shape[1]
    if expected is not None and saved.shape[1] != expected:
        raise RuntimeError(
            f"mix_linear: the saved input: expected {expected} columns, got {saved.shape[1]}: it was gathered by "
            "another mask"
        )


def _rows(t: Tensor) -> Tensor:
    """[rows, features], each row contiguous; the rows are counted, since reshape cannot infer them for 0 features."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()
