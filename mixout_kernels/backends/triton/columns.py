"""The kept columns of a matrix side by side at a fixed width, and back, where one decision serves a whole column.

The position of a kept column is the number of kept columns before it, which every program counts from the seed (a
Philox call per four columns): no list of indices, no second launch, and nothing of the mask's value reaches the host.
Kept columns beyond the width are left out in both directions; unused columns of the compact matrix are zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...draws import Draw
from .launch import launch
from .mask import as_bound, count_kept, keep_line, threshold_argument

# 32 elements per thread. The count of earlier columns costs a program in / 8 Philox calls on average, so its tile is
# tall enough to be worth it; the long side lies along contiguous memory.
_WARPS = 4
_ROW_MAJOR_TILE = (16, 256)
_COLUMN_MAJOR_TILE = (128, 32)


@triton.jit
def kept_positions(seed, bound, offset, first, columns, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """For the columns first, first + 1, ...: whether each is kept, and its place among the kept ones."""
    column = first + tl.arange(0, WIDTH)
    offset = tl.cast(offset, tl.int64)  # an index may pass 2^31
    keep = keep_line(seed, bound, offset + first, ALIGNED, WIDTH) & (column < columns)
    return keep, count_kept(seed, bound, offset, first, ALIGNED) + tl.cumsum(keep.to(tl.int32), 0) - 1


@triton.jit
def gather_tile(
    x_ptr, out_ptr, seed, bound, offset, tile, rows, columns, width,
    stride_xr, stride_xc, stride_or, stride_oc,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(columns, COLUMNS)
    first_column = (tile % tiles_across) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    row = ((tile // tiles_across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = (row < rows)[:, None]
    keep, position = kept_positions(seed, bound, offset, first_column, columns, ALIGNED, COLUMNS)
    x = tl.load(
        x_ptr + row[:, None] * stride_xr + column.to(tl.int64)[None, :] * stride_xc,
        mask=row_inside & (column < columns)[None, :],
    )
    out_row = out_ptr + row[:, None] * stride_or
    fits = keep & (position < width)
    tl.store(out_row + position.to(tl.int64)[None, :] * stride_oc, x, mask=row_inside & fits[None, :])
    if first_column + COLUMNS >= columns:  # the last tile of the row knows how many are kept
        for start in range(tl.max(position) + 1, width, COLUMNS):
            unused = start + tl.arange(0, COLUMNS)
            tl.store(
                out_row + unused.to(tl.int64)[None, :] * stride_oc,
                tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty),
                mask=row_inside & (unused < width)[None, :],
            )


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _gather_columns_kernel(
    x_ptr, out_ptr, seed_ptr, threshold, offset, rows, columns, width,
    stride_xr, stride_xc, stride_or, stride_oc,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    gather_tile(
        x_ptr, out_ptr, tl.load(seed_ptr), as_bound(threshold), offset, tl.program_id(0), rows, columns, width,
        stride_xr, stride_xc, stride_or, stride_oc, ALIGNED, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _scatter_columns_kernel(
    compact_ptr, out_ptr, seed_ptr, threshold, offset, rows, columns, width,
    stride_cr, stride_cc, stride_or, stride_oc, scale,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    first_column = (tile % tiles_across) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    row = ((tile // tiles_across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = (row < rows)[:, None]
    keep, position = kept_positions(
        tl.load(seed_ptr), as_bound(threshold), offset, first_column, columns, ALIGNED, COLUMNS
    )
    fits = keep & (position < width)
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


def gather_columns(x: Tensor, draw: Draw, width: int) -> Tensor:
    """x[:, kept] [rows, width], in the memory layout of x [rows, columns]; the columns past the kept ones are zero."""
    rows, columns = x.shape
    out = x.new_empty((width, rows)).t() if x.stride(0) == 1 and columns > 1 else x.new_empty((rows, width))
    if width:
        _launch(_gather_columns_kernel, x, out, x.shape, width, draw)
    return out


def scatter_columns(compact: Tensor, out: Tensor, draw: Draw, scale: float) -> Tensor:
    """Writes scale * compact [rows, width] into the kept columns of ``out`` [rows, columns], zero elsewhere."""
    _launch(_scatter_columns_kernel, compact, out, out.shape, compact.shape[1], draw, scale)
    return out


def _launch(
    kernel: triton.JITFunction, source: Tensor, out: Tensor, shape: torch.Size, width: int, draw: Draw,
    *scale: float,
) -> None:  # fmt: skip
    rows, columns = shape
    tile_rows, tile_columns = tile(out.stride(0) == 1 and columns > 1)
    launch(
        kernel, triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),
        source, out, draw.seed, threshold_argument(draw), draw.offset, rows, columns, width,
        *source.stride(), *out.stride(), *scale,
        ALIGNED=draw.offset % 4 == 0, ROWS=tile_rows, COLUMNS=tile_columns, num_warps=_WARPS,
    )  # fmt: skip


def tile(column_major: bool) -> tuple[int, int]:
    return _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
