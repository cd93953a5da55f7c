"""dw = scale * M * (g^T x) and db = sum g in one launch, for the fused schedule.

Where one decision serves a whole column, x comes as x[:, kept]: each column of the tile reads its own kept column, a
dropped one reads zeros, and dw is written once, dense. Otherwise the mask is regenerated over the finished product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...draws import Draw
from .columns import kept_positions
from .launch import MOST_REGISTERS_OF_A_GEMM, float32_precision, launch
from .mask import Placement, as_bound, keep_tile, threshold_argument


@triton.jit
def _masked_product(
    g_ptr, x_ptr, dw_ptr, seed, bound, placement, scale, tile, rows, outputs, features, width,
    stride_gm, stride_xm, dw_strides,
    BY_COLUMN: tl.constexpr, PATTERN: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tiles_f = tl.cdiv(features, BF)
    first_o = (tile // tiles_f) * BO
    first_f = (tile % tiles_f) * BF
    o = (first_o + tl.arange(0, BO)).to(tl.int64)
    f = (first_f + tl.arange(0, BF)).to(tl.int64)
    o_inside = (o < outputs)[:, None]
    f_inside = (f < features)[None, :]
    if BY_COLUMN:
        keep, position = kept_positions(seed, bound, placement.offset, first_f, features, PATTERN.aligned, BF)
        x_column = x_ptr + position[None, :]
        x_inside = (keep & (position < width))[None, :]
    else:
        x_column = x_ptr + f[None, :]
        x_inside = f_inside
    total = tl.zeros((BO, BF), tl.float32)
    for first_m in range(0, rows, BM):
        m = (first_m + tl.arange(0, BM)).to(tl.int64)
        g = tl.load(g_ptr + m[None, :] * stride_gm + o[:, None], mask=o_inside & (m < rows)[None, :], other=0.0)
        x = tl.load(x_column + m[:, None] * stride_xm, mask=(m < rows)[:, None] & x_inside, other=0.0)
        total = tl.dot(g, x, total, input_precision=PRECISION)
    dw = total * scale
    if BY_COLUMN:
        # Zeros times an infinite g are NaN: a dropped column is selected here too.
        dw = tl.where(x_inside, dw, 0.0)
    else:
        dw = tl.where(keep_tile(seed, bound, placement, first_o, first_f, PATTERN, BO, BF), dw, 0.0)
    tl.store(
        dw_ptr + o[:, None] * dw_strides[0] + f[None, :] * dw_strides[1],
        dw.to(dw_ptr.dtype.element_ty),
        mask=o_inside & f_inside,
    )


@triton.jit
def _column_sums(g_ptr, sum_ptr, tile, rows, columns, stride_gm, BC: tl.constexpr, BM: tl.constexpr):
    column = (tile * BC + tl.arange(0, BC)).to(tl.int64)
    inside = (column < columns)[None, :]
    total = tl.zeros((BM, BC), tl.float32)
    for first_m in range(0, rows, BM):
        m = (first_m + tl.arange(0, BM)).to(tl.int64)[:, None]
        total += tl.load(g_ptr + m * stride_gm + column[None, :], mask=(m < rows) & inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + column, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _weight_gradient_kernel(
    g_ptr, x_ptr, dw_ptr, db_ptr, seed_ptr, threshold, placement, scale, rows, outputs, features, width,
    stride_gm, stride_xm, dw_strides,
    BY_COLUMN: tl.constexpr, PATTERN: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Programs beyond those of dw sum the columns of g for db."""
    tile = tl.program_id(0)
    product_tiles = tl.cdiv(outputs, BO) * tl.cdiv(features, BF)
    if tile < product_tiles:
        _masked_product(
            g_ptr, x_ptr, dw_ptr, tl.load(seed_ptr), as_bound(threshold), placement, scale,
            tile, rows, outputs, features, width, stride_gm, stride_xm, dw_strides,
            BY_COLUMN, PATTERN, PRECISION, BO, BF, BM,
        )  # fmt: skip
    elif NEEDS_DB:
        _column_sums(g_ptr, db_ptr, tile - product_tiles, rows, outputs, stride_gm, BO, BM)


# The output is dw itself, so programs abound; two tiles of 64 x 128 fit an SM. They spilled where every element takes a
# Philox call of its own, and without tensor cores 64 x 64 did (on sm_100, with loads of less than 16 bytes). IEEE
# float32 has 32 outputs, as in fused_linear.py.
_TENSOR_CORE_TILE = (64, 128, 32, 8)
_PER_ELEMENT_TILE = (64, 64, 32, 8)
_IEEE_TILE = (32, 64, 16, 4)
_STAGES = 3


def fused_weight_gradient(
    g: Tensor, saved: Tensor, weight: Tensor, draw: Draw, scale: float, needs_db: bool
) -> tuple[Tensor, Tensor]:
    """dw, like ``weight`` [out, in], and db [out] or empty; ``saved`` is x[:, kept] for a draw by column, else x."""
    outputs, features = weight.shape
    dw = torch.empty_like(weight)
    db = g.new_empty(outputs if needs_db else 0)
    placement = Placement.of(draw)
    pattern = placement.pattern
    precision = float32_precision()
    if g.dtype == torch.float32 and precision == "ieee":
        block_o, block_f, block_m, warps = _IEEE_TILE
    else:
        block_o, block_f, block_m, warps = _PER_ELEMENT_TILE if pattern.per_element else _TENSOR_CORE_TILE
    tiles_o = triton.cdiv(outputs, block_o)
    programs = tiles_o * triton.cdiv(features, block_f) + (tiles_o if needs_db else 0)
    launch(
        _weight_gradient_kernel, programs,
        g, saved, dw, db if needs_db else dw, draw.seed, threshold_argument(draw), placement, scale,
        g.shape[0], outputs, features, saved.shape[1], g.stride(0), saved.stride(0), dw.stride(),
        BY_COLUMN=draw.by_column, PATTERN=pattern, NEEDS_DB=needs_db, PRECISION=precision,
        BO=block_o, BF=block_f, BM=block_m, num_warps=warps, maxnreg=MOST_REGISTERS_OF_A_GEMM, num_stages=_STAGES,
    )  # fmt: skip
    return dw, db
