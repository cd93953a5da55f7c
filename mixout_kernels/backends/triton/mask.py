"""The mask inside Triton kernels: regenerated from the seed wherever it is needed, never stored.

    word(seed, i) = lane i % 4 of Philox4x32-10(key = seed, counter = i // 4)
    index(r, c)   = offset + r * row_stride + (c // inner) * column_stride
    keep(r, c)    = word(seed, index(r, c)) >= floor(p * 2^32)

One Philox call decides four neighbouring indices, so runs of indices are generated a quarter as wide and the four words
of a call joined side by side; ``keep_each`` is for indices that do not come in such runs. Which of the two a kernel is
compiled for is its ``Pattern``, read off the strides alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...draws import Draw, Layout
from .launch import launch

_ANY = -1
_COUNT_BLOCK = tl.constexpr(1024)
_FLAT_TILE = (1, 1024)
_TILE = (16, 64)


class Pattern(NamedTuple):
    """What a kernel is compiled for: the strides where they are 0 or 1, else -1, and whether runs of four are aligned.

    ``aligned``: one of the strides is 1, and offset and the other stride are multiples of 4, so that the four indices
    of a Philox call lie side by side in a tile that starts at a multiple of 4.
    """

    row_stride: int
    column_stride: int
    aligned: bool

    @property
    def per_element(self) -> bool:
        """Whether every decision of a tile takes a Philox call of its own."""
        return not self.aligned and 0 not in (self.row_stride, self.column_stride)


class Placement(NamedTuple):
    """Where the decisions for a matrix lie: (r, c) has offset + r * row_stride + (c // inner) * column_stride."""

    offset: int
    row_stride: int
    column_stride: int
    inner: int

    @classmethod
    def of(cls, draw: Draw) -> Placement:
        """That of a 2-D weight."""
        row_stride, column_stride = draw.strides
        return cls(draw.offset, row_stride, column_stride, 1)

    @classmethod
    def in_memory(cls, draw: Draw, layout: Layout) -> Placement:
        """That of contiguous memory as ``draw.layout`` sees it."""
        return cls(draw.offset, layout.row_stride, layout.column_stride, layout.inner)

    @property
    def pattern(self) -> Pattern:
        return _pattern(self)


@functools.lru_cache(maxsize=1024)  # a model has few, and asks at every launch
def _pattern(placement: Placement) -> Pattern:
    offset, row_stride, column_stride, inner = placement
    row = row_stride if row_stride in (0, 1) else _ANY
    column = column_stride if column_stride == 0 or (column_stride, inner) == (1, 1) else _ANY
    other_stride = row_stride if column == 1 else column_stride
    aligned = 1 in (row, column) and other_stride % 4 == 0 and offset % 4 == 0
    return Pattern(row, column, aligned)


def threshold_argument(draw: Draw) -> int:
    """The threshold for p < 1, wrapped to int32: Triton then sees one type for every p and compiles once."""
    return draw.threshold - 2**32 if draw.threshold >= 2**31 else draw.threshold


@triton.jit
def as_bound(threshold):
    """``threshold_argument`` as the unsigned number that words are compared with."""
    return threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _philox4x32_10(seed, counter):
    """The four words for each 64-bit counter. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Written out, because each product of ``tl.philox`` compiles to a high and a low multiply. A 64-bit product is one
    instruction: 19 IMAD.WIDE on sm_90 for the ten rounds, in place of 17 IMAD.HI and as many IMAD.
    """
    key_lo = seed.to(tl.uint64).to(tl.uint32)
    key_hi = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    counter = counter.to(tl.uint64)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key_lo
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key_hi
        c3 = a.to(tl.uint32)
        # In 64 bits and cut off: the interpreter would warn of an overflow of 32.
        key_lo = (key_lo.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key_hi = (key_hi.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _keep_quads(seed, bound, counter):
    """[..., 2, 2] decisions per counter; flattened, they are in the order of their indices."""
    w0, w1, w2, w3 = _philox4x32_10(seed, counter)
    return tl.join(tl.join(w0 >= bound, w2 >= bound), tl.join(w1 >= bound, w3 >= bound))


@triton.jit
def keep_each(seed, bound, index):
    """The decision for each index, in the shape of ``index``."""
    w0, w1, w2, w3 = _philox4x32_10(seed, index >> 2)
    low = tl.where(index & 1 == 0, w0, w1)
    high = tl.where(index & 1 == 0, w2, w3)
    return tl.where(index & 2 == 0, low, high) >= bound


@triton.jit
def keep_line(seed, bound, first, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] decisions for the indices first, first + 1, ...; ALIGNED: ``first`` is a multiple of 4."""
    if ALIGNED:
        keep = _keep_quads(seed, bound, (first >> 2) + tl.arange(0, WIDTH // 4)).reshape(WIDTH)
    else:
        keep = keep_each(seed, bound, first + tl.arange(0, WIDTH))
    return keep


@triton.jit
def keep_rows(seed, bound, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] decisions, in each row for the indices first[row], first[row] + 1, ...; multiples of 4."""
    counter = (first >> 2)[:, None] + tl.arange(0, WIDTH // 4)[None, :]
    return _keep_quads(seed, bound, counter).reshape(ROWS, WIDTH)


@triton.jit
def keep_tile(
    seed, bound, placement, first_row, first_column,
    PATTERN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The decisions [ROWS, COLUMNS] from (first_row, first_column) on; a dimension that shares them has size 1."""
    # int64 from here on: an index may pass 2^31.
    offset = tl.cast(placement.offset, tl.int64)
    first_row = tl.cast(first_row, tl.int64)
    first_column = tl.cast(first_column, tl.int64)
    row = first_row + tl.arange(0, 1 if PATTERN.row_stride == 0 else ROWS)
    column = first_column + tl.arange(0, 1 if PATTERN.column_stride == 0 else COLUMNS)
    row_index = offset + row * placement.row_stride
    column_index = (column // placement.inner) * placement.column_stride
    if PATTERN.row_stride == 0 and PATTERN.column_stride == 1:
        keep = keep_line(seed, bound, offset + first_column, PATTERN.aligned, COLUMNS)[None, :]
    elif PATTERN.row_stride == 1 and PATTERN.column_stride == 0:
        keep = keep_line(seed, bound, offset + first_row, PATTERN.aligned, ROWS)[:, None]
    elif PATTERN.column_stride == 1 and PATTERN.aligned:
        keep = keep_rows(seed, bound, row_index + first_column, ROWS, COLUMNS)
    elif PATTERN.row_stride == 1 and PATTERN.aligned:
        keep = keep_rows(seed, bound, offset + column_index + first_row, COLUMNS, ROWS).trans()
    else:
        keep = keep_each(seed, bound, row_index[:, None] + column_index[None, :])
    return keep


@triton.jit
def count_kept(seed, bound, first, count, ALIGNED: tl.constexpr):
    """How many of the ``count`` indices first, first + 1, ... are kept; ALIGNED: both are multiples of 4."""
    first = tl.cast(first, tl.int64)
    kept = tl.zeros((_COUNT_BLOCK // 4 if ALIGNED else _COUNT_BLOCK,), tl.int32)
    if ALIGNED:  # the words of a call need not be joined to be counted
        for start in range(0, count // 4, _COUNT_BLOCK // 4):
            quad = start + tl.arange(0, _COUNT_BLOCK // 4)
            w0, w1, w2, w3 = _philox4x32_10(seed, (first >> 2) + quad)
            of_four = (w0 >= bound).to(tl.int32) + (w1 >= bound) + (w2 >= bound) + (w3 >= bound)
            kept += tl.where(quad < count // 4, of_four, 0)
    else:
        for start in range(0, count, _COUNT_BLOCK):
            place = start + tl.arange(0, _COUNT_BLOCK)
            kept += (keep_each(seed, bound, first + place) & (place < count)).to(tl.int32)
    return tl.sum(kept)


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _keep_mask_kernel(
    keep_ptr, seed_ptr, threshold, placement, rows, columns,
    PATTERN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_across = tl.cdiv(columns, COLUMNS)
    first_row = (tile // tiles_across).to(tl.int64) * ROWS
    first_column = (tile % tiles_across).to(tl.int64) * COLUMNS
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_column + tl.arange(0, COLUMNS))[None, :]
    keep = keep_tile(tl.load(seed_ptr), as_bound(threshold), placement, first_row, first_column, PATTERN, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    tl.store(keep_ptr + row * columns + column, tl.broadcast_to(keep, ROWS, COLUMNS), mask=inside)


def keep_mask(draw: Draw, shape: Sequence[int]) -> Tensor:
    """The decisions for p < 1, a bool tensor of this shape."""
    keep = torch.empty(tuple(shape), dtype=torch.bool, device=draw.seed.device)
    layout = draw.layout(shape)
    placement = Placement.in_memory(draw, layout)
    tile_rows, tile_columns = _FLAT_TILE if layout.rows == 1 else _TILE
    launch(
        _keep_mask_kernel, triton.cdiv(layout.rows, tile_rows) * triton.cdiv(layout.columns, tile_columns),
        keep, draw.seed, threshold_argument(draw), placement, layout.rows, layout.columns,
        PATTERN=placement.pattern, ROWS=tile_rows, COLUMNS=tile_columns,
    )  # fmt: skip
    return keep
