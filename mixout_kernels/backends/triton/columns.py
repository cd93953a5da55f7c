"""The kept columns of a matrix under a neuron mask, side by side at a fixed width, and back.

The position of a kept column is the number of kept columns before it, which every program counts from the seed (a
Philox call per four columns): no list of indices, no second launch, and nothing of the mask's value reaches the host.
Kept columns beyond the width are left out in both directions; unused columns of the compact matrix are zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .mask import count_kept, keep_line, threshold_argument

# 32 elements per thread. The count of earlier columns costs a program in / 8 Philox calls on average, so its tile is
# tall enough to be worth it; the long side lies along contiguous memory.
_WARPS = 4
_ROW_MAJOR_TILE = (16, 256)
_COLUMN_MAJOR_TILE = (128, 32)


@triton.jit
def kept_positions(seed, threshold, first, columns, WIDTH: tl.constexpr):
    """For the columns first, first + 1, ...: whether each is kept, and its place among the kept ones."""
    column = first + tl.arange(0, WIDTH)
    keep = keep_line(seed, threshold, first, WIDTH) & (column < columns)
    return keep, count_kept(seed, threshold, first) + tl.cumsum(keep.to(tl.int32), 0) - 1


@triton.jit
def gather_tile(
    x_ptr, out_ptr, seed, threshold, tile, rows, columns, capacity,
    stride_xr, stride_xc, stride_or, stride_oc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(columns, COLUMNS)
    first_column = (tile % tiles_across) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    row = ((tile // tiles_across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = (row < rows)[:, None]
    keep, position = kept_positions(seed, threshold, first_column, columns, COLUMNS)
    x = tl.load(
        x_ptr + row[:, None] * stride_xr + column.to(tl.int64)[None, :] * stride_xc,
        mask=row_inside & (column < columns)[None, :],
    )
    out_row = out_ptr + row[:, None] * stride_or
    fits = keep & (position < capacity)
    tl.store(out_row + position.to(tl.int64)[None, :] * stride_oc, x, mask=row_inside & fits[None, :])
    if first_column + COLUMNS >= columns:  # the last tile of the row knows how many are kept
        for start in range(tl.max(position) + 1, capacity, COLUMNS):
            unused = start + tl.arange(0, COLUMNS)
            tl.store(
                out_row + unused.to(tl.int64)[None, :] * stride_oc,
                tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty),
                mask=row_inside & (unused < capacity)[None, :],
            )


@triton.jit(do_not_specialize=["threshold"])
def _gather_columns_kernel(
    x_ptr, out_ptr, seed_ptr, threshold, rows, columns, capacity,
    stride_xr, stride_xc, stride_or, stride_oc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    gather_tile(
        x_ptr, out_ptr, tl.load(seed_ptr), threshold, tl.program_id(0), rows, columns, capacity,
        stride_xr, stride_xc, stride_or, stride_oc, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def _scatter_columns_kernel(
    compact_ptr, out_ptr, seed_ptr, threshold, rows, columns, capacity,
    stride_cr, stride_cc, stride_or, stride_oc, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    first_column = (tile % tiles_across) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    row = ((tile // tiles_across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = (row < rows)[:, None]
    keep, position = kept_positions(tl.load(seed_ptr), threshold, first_column, columns, COLUMNS)
    fits = keep & (position < capacity)
    value = tl.load(
        compact_ptr + row[:, None] * stride_cr + position.to(tl.int64)[None, :] * stride_cc,
        mask=row_inside & fits[None, :],
        other=0.0,
    )
    tl.store(
        out_ptr + row[:, None] * stride_or + column.to(tl.int64)[None, :] * stride_oc,
        (value.to(tl.float32) * scale).to(out_ptr.dtype.element_ty),
        mask=row_inside & (column < columns)[None, :],
    )


def gather_columns(x: Tensor, seed: Tensor, p: float, capacity: int) -> Tensor:
    """x[:, kept] [rows, capacity], in the memory layout of x [rows, columns]; for p < 1."""
    rows, columns = x.shape
    out = x.new_empty((capacity, rows)).t() if x.stride(0) == 1 and columns > 1 else x.new_empty((rows, capacity))
    if out.numel():
        _launch(_gather_columns_kernel, x, out, x.shape, capacity, seed, p)
    return out


def scatter_columns(compact: Tensor, out: Tensor, seed: Tensor, p: float, scale: float) -> Tensor:
    """Writes scale * compact [rows, capacity] into the kept columns of ``out`` [rows, columns], zero elsewhere."""
    if out.numel():
        _launch(_scatter_columns_kernel, compact, out, out.shape, compact.shape[1], seed, p, scale)
    return out


def _launch(
    kernel: triton.JITFunction,
    source: Tensor,
    out: Tensor,
    shape: torch.Size,
    capacity: int,
    seed: Tensor,
    p: float,
    *scale: float,
) -> None:
    rows, columns = shape
    tile_rows, tile_columns = tile(out.stride(0) == 1 and columns > 1)
    launch(
        kernel, triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),
        source, out, seed, threshold_argument(p), rows, columns, capacity, *source.stride(), *out.stride(), *scale,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=_WARPS,
    )  # fmt: skip


def tile(column_major: bool) -> tuple[int, int]:
    return _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
