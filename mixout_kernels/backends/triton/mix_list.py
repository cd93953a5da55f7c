"""Phi of any number of 2-D weights in one launch: for small layers a launch costs more than the pass over memory.

A program finds its tensors in a table on the device: addresses, shapes and the first tile of each. The table depends on
the addresses alone, so that it is built once for a list of parameters, and copied from pinned memory, which no
synchronisation waits for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .launch import launch
from .mask import threshold_argument
from .mix import WARPS, mix_into, mix_tile, tile_shape

_NEVER = 2**62  # the first tile of an unused slot
# A weight in the table: first tile, addresses of w, u and Phi, rows, columns, index of its seed.
_Entry = tuple[int, int, int, int, int, int, int]
# The tables that a CUDA graph copies: a replay reads them again. torch captures copies from pinned memory alone since
# 2.11, which is also the first version that can pin memory during a capture.
_captured: list[Tensor] = []
_PINNED_IN_CAPTURE = TorchVersion(torch.__version__) >= "2.11.0a0"


@triton.jit(do_not_specialize=["threshold"])
def _mix_list_kernel(
    table_ptr, w_like_ptr, u_like_ptr, phi_like_ptr, seeds_ptr, threshold, scale,
    PER_WEIGHT: tl.constexpr, GROUPED: tl.constexpr, HAS_TARGET: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    ALIGNED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first_tiles = tl.load(table_ptr + tl.arange(0, SLOTS))
    slot = tl.sum((first_tiles <= tile).to(tl.int32)) - 1
    entry = table_ptr + slot
    tile = (tile - tl.load(entry)).to(tl.int32)
    w_ptr = tl.load(entry + SLOTS).to(w_like_ptr.dtype)
    u_ptr = tl.load(entry + 2 * SLOTS).to(u_like_ptr.dtype)
    phi_ptr = tl.load(entry + 3 * SLOTS).to(phi_like_ptr.dtype)
    rows = tl.load(entry + 4 * SLOTS)
    columns = tl.load(entry + 5 * SLOTS)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        u_ptr = tl.multiple_of(u_ptr, 16)
        phi_ptr = tl.multiple_of(phi_ptr, 16)
        if COLUMN_MAJOR:
            rows = tl.multiple_of(rows, 16)
        else:
            columns = tl.multiple_of(columns, 16)
    seed = tl.load(seeds_ptr + tl.load(entry + 6 * SLOTS))
    if COLUMN_MAJOR:
        mix_tile(
            w_ptr, u_ptr, phi_ptr, seed, threshold, scale, tile, rows, columns, 1, rows, 1, rows, 1, rows,
            PER_WEIGHT, 1, GROUPED, HAS_TARGET, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        mix_tile(
            w_ptr, u_ptr, phi_ptr, seed, threshold, scale, tile, rows, columns, columns, 1, columns, 1, columns, 1,
            PER_WEIGHT, 1, GROUPED, HAS_TARGET, ROWS, COLUMNS,
        )  # fmt: skip


def mixout_list(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    seeds: Tensor,
    p: float,
    mask: str,
) -> None:
    """Writes Phi of weight k [out, in], by the k-th seed, into out k; for p < 1.

    One launch for all that agree in dtypes and in memory layout, which the weights of a model do, and one for each
    weight whose layout is not dense, or not that of its target and its out.
    """
    kinds: dict[tuple[str, torch.dtype, torch.dtype | None, torch.dtype], list[int]] = {}
    for k, (out, weight, target) in enumerate(zip(outs, weights, targets, strict=True)):
        layout = _layout(out, weight, target)
        if layout is None:
            mix_into(out, weight, target, seeds[k], p, 1 / (1 - p), mask == "weight")
        elif weight.numel():
            kind = (layout, weight.dtype, None if target is None else target.dtype, out.dtype)
            kinds.setdefault(kind, []).append(k)
    for (layout, *_), indices in kinds.items():
        _mix_kind(outs, weights, targets, indices, seeds, p, mask == "weight", layout == "column-major")


def _layout(*tensors: Tensor | None) -> str | None:
    """The one dense layout of them all, if there is one."""
    present = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in present):
        return "row-major"
    return "column-major" if all(t.t().is_contiguous() for t in present) else None


def _mix_kind(
    outs: Sequence[Tensor], weights: Sequence[Tensor], targets: Sequence[Tensor | None], indices: list[int],
    seeds: Tensor, p: float, per_weight: bool, column_major: bool,
) -> None:  # fmt: skip
    flat = per_weight and not column_major  # runs of four at any width
    tile_rows, tile_columns = tile_shape(1 if flat else 2, column_major)
    entries: list[_Entry] = []
    tiles = 0
    for k in indices:
        w, u = weights[k], targets[k]
        rows, columns = (1, w.numel()) if flat else w.shape
        addresses = (w.data_ptr(), 0 if u is None else u.data_ptr(), outs[k].data_ptr())
        entries.append((tiles, *addresses, rows, columns, k))
        tiles += triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    contiguous = 4 if column_major else 5
    first = indices[0]
    u_like = targets[first]
    launch(
        _mix_list_kernel, tiles,
        _device_table(tuple(entries), seeds.device), weights[first], weights[first] if u_like is None else u_like,
        outs[first], seeds, threshold_argument(p), 1 / (1 - p),
        PER_WEIGHT=per_weight, GROUPED=flat or all(entry[5] % 4 == 0 for entry in entries),
        HAS_TARGET=u_like is not None, COLUMN_MAJOR=column_major,
        ALIGNED=all(number % 16 == 0 for entry in entries for number in (*entry[1:4], entry[contiguous])),
        SLOTS=triton.next_power_of_2(len(entries)), ROWS=tile_rows, COLUMNS=tile_columns, num_warps=WARPS,
    )  # fmt: skip


def _device_table(entries: tuple[_Entry, ...], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return _host_table(entries)
    if torch.cuda.is_current_stream_capturing():  # the copy happens at replay: nobody else may rely on it
        table = _host_table(entries)
        _captured.append(table.pin_memory() if _PINNED_IN_CAPTURE else table)
        return _captured[-1].to(device, non_blocking=True)
    return _cached_table(entries, device, torch.cuda.current_stream(device))


@functools.lru_cache(maxsize=64)
def _cached_table(entries: tuple[_Entry, ...], device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """Per stream, because only this one orders its copy before the kernels that read it."""
    return _host_table(entries).pin_memory().to(device, non_blocking=True)


def _host_table(entries: tuple[_Entry, ...]) -> Tensor:
    """[fields, slots]; the number of slots is a power of two, so that few kernels serve lists of any length."""
    table = torch.zeros(len(entries[0]), triton.next_power_of_2(len(entries)), dtype=torch.int64)
    table[0] = _NEVER
    table[:, : len(entries)] = torch.tensor(entries, dtype=torch.int64).t()
    return table
