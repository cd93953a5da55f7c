"""y = x Phi^T + b and dx = g Phi in one launch: mask, mix and GEMM in one kernel, Phi only ever in registers.

Both are the product  result[m, o] = sum_r Phi[o, r] x[m, r]  with Phi indexed [output, reduced]: forward reduces over
the input features, backward over the output features, so that backward takes the transposed weight and its transposed
draw. It is computed transposed, Phi tile times x tile, because the left operand of a warpgroup product may lie in
registers, where the mix leaves it, and because its shape suits few rows: the weight fills the 64 rows of the
instruction, x as few as 8 columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...draws import Draw
from . import columns
from .launch import MOST_REGISTERS_OF_A_GEMM, float32_precision, launch, shared_memory
from .mask import Placement, as_bound, keep_tile, threshold_argument
from .mix import mix


@triton.jit
def _mixed_product(
    x_ptr, w_ptr, u_ptr, bias_ptr, result_ptr, seed, bound, placement, scale, tile, rows, outputs, reduced,
    stride_xm, w_strides, u_strides,
    PATTERN: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a tile of w and u, the larger operands, and find it in the L2 cache.
    tiles_m = tl.cdiv(rows, BM)
    first_o = (tile // tiles_m) * BO
    m = ((tile % tiles_m) * BM + tl.arange(0, BM)).to(tl.int64)
    o = (first_o + tl.arange(0, BO)).to(tl.int64)
    m_inside = (m < rows)[None, :]
    o_inside = (o < outputs)[:, None]
    x_row = x_ptr + m[None, :] * stride_xm
    w_row = w_ptr + o[:, None] * w_strides[0]
    u_row = u_ptr + o[:, None] * u_strides[0]
    total = tl.zeros((BO, BM), tl.float32)
    if PATTERN.column_stride == 0:  # one decision for all that is reduced
        keep = keep_tile(seed, bound, placement, first_o, 0, PATTERN, BO, BR)
    for first_r in range(0, reduced, BR):
        r = (first_r + tl.arange(0, BR)).to(tl.int64)
        r_inside = r < reduced
        x = tl.load(x_row + r[:, None], mask=r_inside[:, None] & m_inside, other=0.0)  # [BR, BM]
        inside = o_inside & r_inside[None, :]
        w = tl.load(w_row + r[None, :] * w_strides[1], mask=inside, other=0.0).to(tl.float32)  # [BO, BR]
        u = w
        if HAS_TARGET:
            u = tl.load(u_row + r[None, :] * u_strides[1], mask=inside, other=0.0).to(tl.float32)
        if PATTERN.column_stride != 0:
            keep = keep_tile(seed, bound, placement, first_o, first_r, PATTERN, BO, BR)
        phi = mix(keep, w, u, scale, HAS_TARGET).to(x.dtype)
        total = tl.dot(phi, x, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(
        result_ptr + m[None, :] * outputs + o[:, None],
        total.to(result_ptr.dtype.element_ty),
        mask=o_inside & m_inside,
    )


@triton.jit(do_not_specialize=["threshold", "kept_threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _fused_linear_kernel(
    x_ptr, w_ptr, u_ptr, bias_ptr, result_ptr, kept_ptr, seed_ptr, threshold, kept_threshold, placement, scale,
    rows, outputs, reduced, width, stride_xm, w_strides, u_strides,
    PATTERN: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, SAVES_KEPT: tl.constexpr,
    PRECISION: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    SAVED_ROWS: tl.constexpr, SAVED_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs beyond those of the product gather x[:, kept] for backward: another launch would cost more than they."""
    seed = tl.load(seed_ptr)
    tile = tl.program_id(0)
    product_tiles = tl.cdiv(rows, BM) * tl.cdiv(outputs, BO)
    if tile < product_tiles:
        _mixed_product(
            x_ptr, w_ptr, u_ptr, bias_ptr, result_ptr, seed, as_bound(threshold), placement, scale,
            tile, rows, outputs, reduced, stride_xm, w_strides, u_strides,
            PATTERN, HAS_TARGET, HAS_BIAS, PRECISION, BO, BM, BR,
        )  # fmt: skip
    elif SAVES_KEPT:
        columns.gather_tile(
            x_ptr, kept_ptr, seed, as_bound(kept_threshold), placement.offset, tile - product_tiles,
            rows, reduced, width, stride_xm, 1, width, 1, PATTERN.aligned, SAVED_ROWS, SAVED_COLUMNS,
        )  # fmt: skip


class Tile(NamedTuple):
    outputs: int
    rows: int
    reduced: int
    warps: int
    most_stages: int


# 64 outputs are the rows of one warpgroup instruction and give the most programs, which is what few rows lack; 8 warps,
# because 4 would leave each scheduler one warp to hide the mix behind. Rejected because they spilled: 256 bytes of a
# weight's row in dx (sm_80), 64 x 64 in IEEE float32 (sm_90), and all but the ragged tile where loads are not of 16
# bytes or every element takes a Philox call of its own. IEEE float32 has 32 outputs: triton 3.6 multiplies 64 or more
# in TF32 on sm_100, whatever precision was asked for.
_RAGGED = Tile(64, 64, 32, 8, 2)
_RAGGED_IEEE = Tile(32, 64, 16, 8, 3)
_IEEE = Tile(32, 64, 16, 4, 3)
_TF32 = Tile(64, 64, 32, 4, 5)
_ROOMY = 160 * 1024  # what two stages of 128 reduced features need, with a margin; sm_86 and sm_89 have 99 KiB


def tile_for(rows: int, forward: bool, weight: torch.dtype, precision: str, regular: bool, shared: int) -> Tile:
    """``precision``: "ieee", "tf32", or "" for 16-bit products. docs/codegen_triton.md has what each compiles to.

    ``regular``: loads are of 16 bytes, and a Philox call decides more than one element.
    """
    if precision == "ieee":  # multiplied and added without tensor cores
        return _IEEE if regular else _RAGGED_IEEE
    if not regular:
        return _RAGGED
    if precision == "tf32":
        return _TF32
    if rows <= 64:
        wide = forward and weight.itemsize == 2 and shared >= _ROOMY
        return Tile(64, 16 if rows <= 16 else 64, 128 if wide else 64, 8, 5)
    return Tile(64, 128, 64 if weight.itemsize == 2 else 32, 8, 5)


def stages_for(tile: Tile, weight_bytes: int, compute: torch.dtype, shared: int) -> int:
    """As many tiles of x, w and u under way as fit in shared memory, up to a limit: the kernel waits on little else.

    ``weight_bytes``: of an element of w and of u together.
    """
    stage = tile.reduced * (tile.rows * compute.itemsize + tile.outputs * weight_bytes)
    phi = tile.outputs * tile.reduced * compute.itemsize  # passes through on its way to the product's operand
    return max(2, min(tile.most_stages, (shared - phi) // stage))


def _aligned(x: Tensor, weight: Tensor, target: Tensor | None) -> bool:
    """Whether loads are of 16 bytes: Triton asks for addresses, sizes and strides that are multiples of 16."""
    numbers = list(weight.shape)
    for t in (x, weight) if target is None else (x, weight, target):
        numbers += [t.data_ptr(), *(stride for stride in t.stride() if stride != 1)]
    return all(number % 16 == 0 for number in numbers)


def fused_linear(
    x: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, draw: Draw, gather: Draw, width: int
) -> tuple[Tensor, Tensor]:
    """y [rows, out], and x[:, kept] [rows, width] by ``gather``, for x [rows, in] with contiguous rows.

    ``gather`` has the words of ``draw`` and a threshold of its own; it is by column, or ``width`` is 0.
    """
    y = x.new_empty((x.shape[0], weight.shape[0]))
    kept = x.new_empty((x.shape[0], width))
    _launch(x, weight, target, bias, y, kept, draw, gather, forward=True)
    return y, kept


def fused_input_gradient(g: Tensor, weight: Tensor, target: Tensor | None, draw: Draw) -> Tensor:
    """dx [rows, in] = g Phi for g [rows, out] with contiguous rows."""
    dx = g.new_empty((g.shape[0], weight.shape[1]))
    nothing_kept = dx.new_empty((g.shape[0], 0))
    target = None if target is None else target.t()
    _launch(g, weight.t(), target, None, dx, nothing_kept, draw.t(), draw, forward=False)
    return dx


def _launch(
    x: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, result: Tensor, kept: Tensor,
    draw: Draw, gather: Draw, forward: bool,
) -> None:  # fmt: skip
    """``weight``, ``target`` and ``draw`` are those of [output, reduced]."""
    rows, (outputs, reduced), width = x.shape[0], weight.shape, kept.shape[1]
    placement = Placement.of(draw)
    pattern = placement.pattern
    precision = float32_precision() if x.dtype == torch.float32 else ""
    shared = shared_memory(x.device)
    regular = not pattern.per_element and _aligned(x, weight, target)
    tile = tile_for(rows, forward, weight.dtype, precision, regular, shared)
    weight_bytes = weight.itemsize + (0 if target is None else target.itemsize)
    saved_tile = columns.tile(column_major=False)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    if width:
        programs += triton.cdiv(rows, saved_tile[0]) * triton.cdiv(reduced, saved_tile[1])
    u = weight if target is None else target
    launch(
        _fused_linear_kernel, programs,
        x, weight, u, x if bias is None else bias, result, kept if width else x, draw.seed,
        threshold_argument(draw), threshold_argument(gather), placement, draw.scale,
        rows, outputs, reduced, width, x.stride(0), weight.stride(), u.stride(),
        PATTERN=pattern, HAS_TARGET=target is not None, HAS_BIAS=bias is not None, SAVES_KEPT=width > 0,
        PRECISION=precision or "ieee", BO=tile.outputs, BM=tile.rows, BR=tile.reduced,
        SAVED_ROWS=saved_tile[0], SAVED_COLUMNS=saved_tile[1],
        num_warps=tile.warps, num_stages=stages_for(tile, weight_bytes, x.dtype, shared),
        maxnreg=MOST_REGISTERS_OF_A_GEMM,
    )  # fmt: skip
