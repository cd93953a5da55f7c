"""Phi in one pass over w and u: of one weight of any shape, or of many weights in one launch."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .mask import keep_each, keep_line, keep_rows, threshold_argument

# 32 elements per thread: in bfloat16 four 16-byte loads of w and as many of u. A neuron mask is generated once per tile
# for all of its rows, hence the 16; the long side lies along contiguous memory. A flat tile has a mask per element and
# half as many of them: 4096 spilled on sm_90 in float32 without a target.
WARPS = 4
_FLAT_TILE = (1, 2048)
_ROW_MAJOR_TILE = (16, 256)
_COLUMN_MAJOR_TILE = (256, 16)


@triton.jit
def mix(keep, w, u, scale, HAS_TARGET: tl.constexpr):
    """Phi from float32 w and u. A dropped entry is selected: a NaN in a dropped w does not reach the result."""
    if HAS_TARGET:
        return tl.where(keep, (w - u) * scale + u, u)
    return tl.where(keep, w * scale, 0.0)


@triton.jit
def keep_tile(
    seed, threshold, first_row, first_column, columns,
    PER_WEIGHT: tl.constexpr, INNER: tl.constexpr, GROUPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Decisions [ROWS, COLUMNS] or [1, COLUMNS] for a tile of a weight that is ``columns`` wide.

    PER_WEIGHT: i = row * columns + column, and GROUPED says that columns is a multiple of 4 or that there is one row.
    Otherwise i = column // INNER, one decision per feature.
    """
    if PER_WEIGHT:
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        if GROUPED:
            keep = keep_rows(seed, threshold, row * columns + first_column, ROWS, COLUMNS)
        else:
            column = first_column + tl.arange(0, COLUMNS)
            keep = keep_each(seed, threshold, row[:, None] * columns + column[None, :])
    elif INNER == 1:
        keep = keep_line(seed, threshold, first_column, COLUMNS)[None, :]
    else:
        keep = keep_each(seed, threshold, (first_column + tl.arange(0, COLUMNS)) // INNER)[None, :]
    return keep


@triton.jit
def mix_tile(
    w_ptr, u_ptr, phi_ptr, seed, threshold, scale, tile, rows, columns,
    stride_wr, stride_wc, stride_ur, stride_uc, stride_pr, stride_pc,
    PER_WEIGHT: tl.constexpr, INNER: tl.constexpr, GROUPED: tl.constexpr, HAS_TARGET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(columns, COLUMNS)
    first_row = (tile // tiles_across).to(tl.int64) * ROWS
    first_column = (tile % tiles_across).to(tl.int64) * COLUMNS
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_column + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    keep = keep_tile(seed, threshold, first_row, first_column, columns, PER_WEIGHT, INNER, GROUPED, ROWS, COLUMNS)
    w = tl.load(w_ptr + row * stride_wr + column * stride_wc, mask=inside).to(tl.float32)
    u = w
    if HAS_TARGET:
        u = tl.load(u_ptr + row * stride_ur + column * stride_uc, mask=inside).to(tl.float32)
    phi = mix(keep, w, u, scale, HAS_TARGET)
    tl.store(phi_ptr + row * stride_pr + column * stride_pc, phi.to(phi_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _mix_kernel(
    w_ptr, u_ptr, phi_ptr, seed_ptr, threshold, scale, rows, columns,
    stride_wr, stride_wc, stride_ur, stride_uc, stride_pr, stride_pc,
    PER_WEIGHT: tl.constexpr, INNER: tl.constexpr, GROUPED: tl.constexpr, HAS_TARGET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    mix_tile(
        w_ptr, u_ptr, phi_ptr, tl.load(seed_ptr), threshold, scale, tl.program_id(0), rows, columns,
        stride_wr, stride_wc, stride_ur, stride_uc, stride_pr, stride_pc,
        PER_WEIGHT, INNER, GROUPED, HAS_TARGET, ROWS, COLUMNS,
    )  # fmt: skip


def mix_into(
    phi: Tensor, weight: Tensor, target: Tensor | None, seed: Tensor, p: float, scale: float, per_weight: bool
) -> Tensor:
    """Writes Phi of a 2-D weight [out, in] in any memory layout, for p < 1; ``phi`` may be ``weight`` itself."""
    if per_weight and all(t is None or t.is_contiguous() for t in (weight, target, phi)):
        _launch_mix(*_flat(1, weight, target, phi), seed, p, scale, per_weight)  # runs of four at any width
    else:
        _launch_mix(weight, target, phi, seed, p, scale, per_weight)
    return phi


def mixout(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, scale: float, mask: str) -> Tensor:
    """Phi of a weight of one dimension or more: contiguous, in the weight's dtype."""
    if p == 1:
        return weight.new_zeros(weight.shape) if target is None else weight.new_empty(weight.shape).copy_(target)
    phi = weight.new_empty(weight.shape)
    if weight.dim() == 2:
        return mix_into(phi, weight, target, seed, p, scale, mask == "weight")
    per_weight = weight.dim() == 1 or mask == "weight"
    inner = 1 if per_weight else math.prod(weight.shape[2:])
    rows = 1 if per_weight else weight.shape[0]
    if weight.numel():
        _launch_mix(*_flat(rows, weight, target, phi), seed, p, scale, per_weight, inner)
    return phi


def _flat(rows: int, weight: Tensor, target: Tensor | None, phi: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The three as contiguous matrices with ``rows`` rows."""
    target = None if target is None else target.contiguous().view(rows, -1)
    return weight.contiguous().view(rows, -1), target, phi.view(rows, -1)


def _launch_mix(
    weight: Tensor,
    target: Tensor | None,
    phi: Tensor,
    seed: Tensor,
    p: float,
    scale: float,
    per_weight: bool,
    inner: int = 1,
) -> None:
    """``inner``: how many neighbouring columns belong to one feature."""
    if weight.numel() == 0:
        return
    rows, columns = weight.shape
    tile_rows, tile_columns = tile_shape(rows, weight.stride(0) == 1)
    u = weight if target is None else target
    launch(
        _mix_kernel, triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),
        weight, u, phi, seed, threshold_argument(p), scale, rows, columns,
        *weight.stride(), *u.stride(), *phi.stride(),
        PER_WEIGHT=per_weight, INNER=inner, GROUPED=columns % 4 == 0 or rows == 1, HAS_TARGET=target is not None,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=WARPS,
    )  # fmt: skip


def tile_shape(rows: int, column_major: bool) -> tuple[int, int]:
    if rows == 1:
        return _FLAT_TILE
    return _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
