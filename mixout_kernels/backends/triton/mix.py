"""Phi in one pass over w and u: of one weight of any shape, or of many weights in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...draws import Draw
from .launch import launch
from .mask import Pattern, Placement, as_bound, keep_tile, threshold_argument

# 32 elements per thread: in bfloat16 four 16-byte loads of w and as many of u. A line of decisions is generated once
# per tile for all of its rows, hence the 16; the long side lies along contiguous memory. A flat tile has a decision per
# element and half as many of them: 4096 spilled on sm_90 in float32 without a target. Where every decision takes a
# Philox call of its own 2048 did, with strides of which none is 1.
WARPS = 4
_FLAT_TILE = (1, 2048)
_ROW_MAJOR_TILE = (16, 256)
_COLUMN_MAJOR_TILE = (256, 16)
_PER_ELEMENT_ROW_MAJOR_TILE = (4, 256)
_PER_ELEMENT_COLUMN_MAJOR_TILE = (256, 4)


@triton.jit
def mix(keep, w, u, scale, HAS_TARGET: tl.constexpr):
    """Phi from float32 w and u. A dropped entry is selected: a NaN in a dropped w does not reach the result."""
    if HAS_TARGET:
        return tl.where(keep, (w - u) * scale + u, u)
    return tl.where(keep, w * scale, 0.0)


@triton.jit
def mix_tile(
    w_ptr, u_ptr, phi_ptr, seed, bound, placement, scale, tile, rows, columns, w_strides, u_strides, phi_strides,
    PATTERN: tl.constexpr, HAS_TARGET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(columns, COLUMNS)
    first_row = (tile // tiles_across).to(tl.int64) * ROWS
    first_column = (tile % tiles_across).to(tl.int64) * COLUMNS
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_column + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    keep = keep_tile(seed, bound, placement, first_row, first_column, PATTERN, ROWS, COLUMNS)
    w = tl.load(w_ptr + row * w_strides[0] + column * w_strides[1], mask=inside).to(tl.float32)
    u = w
    if HAS_TARGET:
        u = tl.load(u_ptr + row * u_strides[0] + column * u_strides[1], mask=inside).to(tl.float32)
    phi = mix(keep, w, u, scale, HAS_TARGET)
    tl.store(phi_ptr + row * phi_strides[0] + column * phi_strides[1], phi.to(phi_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _mix_kernel(
    w_ptr, u_ptr, phi_ptr, seed_ptr, threshold, placement, scale, rows, columns, w_strides, u_strides, phi_strides,
    PATTERN: tl.constexpr, HAS_TARGET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    mix_tile(
        w_ptr, u_ptr, phi_ptr, tl.load(seed_ptr), as_bound(threshold), placement, scale, tl.program_id(0),
        rows, columns, w_strides, u_strides, phi_strides, PATTERN, HAS_TARGET, ROWS, COLUMNS,
    )  # fmt: skip


def mixout(weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
    """``where(keep, u + (w - u) * factor, u)`` for a weight of one dimension or more: contiguous, in its dtype."""
    phi = weight.new_empty(weight.shape)
    if weight.dim() == 2:
        return mix_into(phi, weight, target, draw, factor)
    layout = draw.layout(weight.shape)
    matrix = layout.rows, layout.columns
    target = None if target is None else target.contiguous().view(matrix)
    placement = Placement.in_memory(draw, layout)
    _launch_mix(phi.view(matrix), weight.contiguous().view(matrix), target, draw, placement, factor)
    return phi


def mix_into(out: Tensor, weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
    """The same into ``out``, which may be ``weight`` itself, for a 2-D weight; each tensor in any memory layout."""
    placement, phi = Placement.of(draw), out
    if rows_follow_on(draw, weight) and all(t is None or t.is_contiguous() for t in (weight, target, out)):
        placement = placement._replace(row_stride=0)
        phi, weight, target = out.view(1, -1), weight.view(1, -1), None if target is None else target.view(1, -1)
    _launch_mix(phi, weight, target, draw, placement, factor)
    return out


def rows_follow_on(draw: Draw, weight: Tensor) -> bool:
    """Whether the decisions make one long row of a contiguous weight, with runs of four at any width."""
    return draw.strides == (weight.shape[1], 1)


def _launch_mix(
    phi: Tensor, weight: Tensor, target: Tensor | None, draw: Draw, placement: Placement, factor: float
) -> None:
    rows, columns = weight.shape
    if rows == 1:
        placement = placement._replace(row_stride=0)  # a flat tile has no row to run down
    pattern = placement.pattern
    tile_rows, tile_columns = tile_shape(rows == 1, weight.stride(0) == 1, pattern)
    u = weight if target is None else target
    launch(
        _mix_kernel, triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),
        weight, u, phi, draw.seed, threshold_argument(draw), placement, factor, rows, columns,
        weight.stride(), u.stride(), phi.stride(),
        PATTERN=pattern, HAS_TARGET=target is not None,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=WARPS,
    )  # fmt: skip


def tile_shape(flat: bool, column_major: bool, pattern: Pattern) -> tuple[int, int]:
    if flat:
        return _FLAT_TILE
    if pattern.per_element:
        return _PER_ELEMENT_COLUMN_MAJOR_TILE if column_major else _PER_ELEMENT_ROW_MAJOR_TILE
    return _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
