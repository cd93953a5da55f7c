"""Phi of any number of 2-D weights in one launch: for small layers a launch costs more than the pass over memory.

A program finds its tensors in a table on the device: addresses, shapes, draws and the first tile of each. The seeds are
there by address too, so that the table is built once for a list of parameters, and copied from pinned memory, which no
synchronisation waits for.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from ...draws import Draw
from .launch import launch
from .mask import Pattern, Placement
from .mix import WARPS, mix_into, mix_tile, rows_follow_on, tile_shape

_NEVER = 2**62  # the first tile of an unused slot
# The tables that a CUDA graph copies: a replay reads them again. torch captures copies from pinned memory alone since
# 2.11, which is also the first version that can pin memory during a capture.
_captured: list[Tensor] = []
_PINNED_IN_CAPTURE = TorchVersion(torch.__version__) >= "2.11.0a0"


class _Batch(NamedTuple):
    """What the weights of one launch have in common."""

    weight: torch.dtype
    target: torch.dtype | None
    phi: torch.dtype
    column_major: bool
    flat: bool
    pattern: Pattern


class _Entry(NamedTuple):
    """A weight in the table: addresses, the shape of the matrix that its memory is taken for, and its draw."""

    weight: int
    target: int
    phi: int
    seed: int
    rows: int
    columns: int
    threshold: int
    scale: float
    placement: Placement

    def words(self) -> tuple[int, ...]:
        """As the kernel reads it: the scale by its bits in float32."""
        (scale_bits,) = struct.unpack("i", struct.pack("f", self.scale))
        return *self[:7], scale_bits, *self.placement[:3]


_LIKE = ("w_like_ptr", "u_like_ptr", "phi_like_ptr", "seed_like_ptr")  # only their types are read


@triton.jit(do_not_specialize_on_alignment=_LIKE)
def _mix_list_kernel(
    table_ptr, w_like_ptr, u_like_ptr, phi_like_ptr, seed_like_ptr,
    PATTERN: tl.constexpr, HAS_TARGET: tl.constexpr, COLUMN_MAJOR: tl.constexpr, ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first_tiles = tl.load(table_ptr + tl.arange(0, SLOTS))
    slot = tl.sum((first_tiles <= tile).to(tl.int32)) - 1
    entry = table_ptr + slot
    tile = (tile - tl.load(entry)).to(tl.int32)
    w_ptr = tl.load(entry + SLOTS).to(w_like_ptr.dtype)
    u_ptr = tl.load(entry + 2 * SLOTS).to(u_like_ptr.dtype)
    phi_ptr = tl.load(entry + 3 * SLOTS).to(phi_like_ptr.dtype)
    seed = tl.load(tl.load(entry + 4 * SLOTS).to(seed_like_ptr.dtype))
    rows = tl.load(entry + 5 * SLOTS)
    columns = tl.load(entry + 6 * SLOTS)
    bound = tl.load(entry + 7 * SLOTS).to(tl.uint32)
    scale = tl.load(entry + 8 * SLOTS).to(tl.int32).to(tl.float32, bitcast=True)
    placement = Placement(tl.load(entry + 9 * SLOTS), tl.load(entry + 10 * SLOTS), tl.load(entry + 11 * SLOTS), 1)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        u_ptr = tl.multiple_of(u_ptr, 16)
        phi_ptr = tl.multiple_of(phi_ptr, 16)
        if COLUMN_MAJOR:
            rows = tl.multiple_of(rows, 16)
        else:
            columns = tl.multiple_of(columns, 16)
    strides = (1, rows) if COLUMN_MAJOR else (columns, 1)
    mix_tile(
        w_ptr, u_ptr, phi_ptr, seed, bound, placement, scale, tile, rows, columns, strides, strides, strides,
        PATTERN, HAS_TARGET, ROWS, COLUMNS,
    )  # fmt: skip


def mixer(
    outs: Sequence[Tensor], weights: Sequence[Tensor], targets: Sequence[Tensor | None], draws: Sequence[Draw]
) -> Callable[[], None]:
    return lambda: mixout_list(outs, weights, targets, draws)


def mixout_list(
    outs: Sequence[Tensor], weights: Sequence[Tensor], targets: Sequence[Tensor | None], draws: Sequence[Draw]
) -> None:
    """Writes Phi of weight k [out, in], by draw k, into out k.

    One launch for all that agree in dtypes, in memory layout and in the pattern of their decisions, whatever their p
    and shape, as the weights of a model do; and one for each weight whose layout is not dense, or not that of its
    target and its out.
    """
    batches: dict[_Batch, tuple[list[int], list[_Entry]]] = {}
    for k, (out, weight, target, draw) in enumerate(zip(outs, weights, targets, draws, strict=True)):
        layout = _layout(out, weight, target)
        if layout is None:
            mix_into(out, weight, target, draw, draw.scale)
            continue
        rows, columns = weight.shape
        placement, column_major = Placement.of(draw), layout == "column-major"
        flat = not column_major and rows_follow_on(draw, weight)
        if flat:
            rows, columns, placement = 1, weight.numel(), placement._replace(row_stride=0)
        target_dtype = None if target is None else target.dtype
        batch = _Batch(weight.dtype, target_dtype, out.dtype, column_major, flat, placement.pattern)
        addresses = weight.data_ptr(), 0 if target is None else target.data_ptr(), out.data_ptr(), draw.seed.data_ptr()
        indices, entries = batches.setdefault(batch, ([], []))
        indices.append(k)
        entries.append(_Entry(*addresses, rows, columns, draw.threshold, draw.scale, placement))
    for batch, (indices, entries) in batches.items():
        first = indices[0]
        target = targets[first]
        likes = weights[first], weights[first] if target is None else target, outs[first], draws[first].seed
        _mix_batch(batch, tuple(entries), likes)


def _layout(*tensors: Tensor | None) -> str | None:
    """The one dense layout of them all, if there is one."""
    present = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in present):
        return "row-major"
    return "column-major" if all(t.t().is_contiguous() for t in present) else None


def _mix_batch(batch: _Batch, entries: tuple[_Entry, ...], like: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """``like``: tensors of the dtypes of a weight, a target, a Phi and a seed."""
    plan = _plan(batch, entries)
    tile_rows, tile_columns = plan.tile
    launch(
        _mix_list_kernel, plan.programs, _device_table(entries, plan.first_tiles, like[0].device), *like,
        PATTERN=batch.pattern, HAS_TARGET=batch.target is not None, COLUMN_MAJOR=batch.column_major,
        ALIGNED=plan.aligned, SLOTS=triton.next_power_of_2(len(entries)), ROWS=tile_rows, COLUMNS=tile_columns,
        num_warps=WARPS,
    )  # fmt: skip


class _Plan(NamedTuple):
    """Which programs mix which weight, and whether all of them may load 16 bytes at a time."""

    tile: tuple[int, int]
    first_tiles: tuple[int, ...]
    programs: int
    aligned: bool


@functools.lru_cache(maxsize=64)
def _plan(batch: _Batch, entries: tuple[_Entry, ...]) -> _Plan:
    tile_rows, tile_columns = tile_shape(batch.flat, batch.column_major, batch.pattern)
    tiles = [triton.cdiv(entry.rows, tile_rows) * triton.cdiv(entry.columns, tile_columns) for entry in entries]
    *first_tiles, programs = itertools.accumulate(tiles, initial=0)
    aligned = all(
        number % 16 == 0
        for entry in entries
        for number in (entry.weight, entry.target, entry.phi, entry.rows if batch.column_major else entry.columns)
    )
    return _Plan((tile_rows, tile_columns), tuple(first_tiles), programs, aligned)


def _device_table(entries: tuple[_Entry, ...], first_tiles: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return _host_table(entries, first_tiles)
    if torch.cuda.is_current_stream_capturing():  # the copy happens at replay: nobody else may rely on it
        table = _host_table(entries, first_tiles)
        _captured.append(table.pin_memory() if _PINNED_IN_CAPTURE else table)
        return _captured[-1].to(device, non_blocking=True)
    return _cached_table(entries, first_tiles, device, torch.cuda.current_stream(device))


@functools.lru_cache(maxsize=64)
def _cached_table(
    entries: tuple[_Entry, ...], first_tiles: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream
) -> Tensor:
    """Per stream, because only this one orders its copy before the kernels that read it."""
    return _host_table(entries, first_tiles).pin_memory().to(device, non_blocking=True)


def _host_table(entries: tuple[_Entry, ...], first_tiles: tuple[int, ...]) -> Tensor:
    """[fields, slots]; the number of slots is a power of two, so that few kernels serve lists of any length."""
    slots = [(first, *entry.words()) for first, entry in zip(first_tiles, entries, strict=True)]
    table = torch.zeros(len(slots[0]), triton.next_power_of_2(len(slots)), dtype=torch.int64)
    table[0] = _NEVER
    table[:, : len(slots)] = torch.tensor(slots, dtype=torch.int64).t()
    return table
