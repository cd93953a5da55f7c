"""FSDP2's reduce-scatter of the kept columns alone: in the others every rank has zeros, the same ones.

FSDP reduces one flat buffer for each module that it was given: ``[ranks, all its gradients]``, of each gradient the
rows of that rank, padded to the same number. Here the kept columns of the mixed weights go into a smaller buffer of the
same kind, with everything else whole, and come back from it; columns that were dropped are zero.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .gathering import Sharded
from .units import Unit


class _Block(NamedTuple):
    """One parameter's part of a rank's buffer: ``rows * width`` numbers, of which the columns ``kept`` travel."""

    name: str
    rows: int
    width: int
    kept: Tensor | None  # None: all

    @property
    def size(self) -> int:
        return self.rows * self.width

    @property
    def packed(self) -> int:
        return self.size if self.kept is None else self.rows * len(self.kept)


class KeptReduceScatter:
    """For ``FSDPModule.set_custom_reduce_scatter`` (torch 2.9 and later), around the communication that was there."""

    def __init__(self, unit: Unit) -> None:
        self.inner = unit.group._reduce_scatter_comm
        self.sent_bytes = self.whole_bytes = 0  # what went into the reductions so far, and what would have without
        self._unit = unit
        self._layers = {id(layer.fsdp_param): layer for layer in unit.layers}
        self._checked = False
        self._reductions = 0

    def install(self) -> None:
        self._unit.module.set_custom_reduce_scatter(self)

    def uninstall(self) -> None:
        if self._unit.group._reduce_scatter_comm is self:
            self._unit.module.set_custom_reduce_scatter(self.inner)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.inner.allocate(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        ranks = group.size()
        self._reductions += 1
        if self._reductions.bit_count() == 1:  # 1, 2, 4, ...: each waits for the device
            self._compare_masks(group)
        whole = input_tensor.view(ranks, -1)
        blocks = self._blocks(ranks)
        self.whole_bytes += input_tensor.nbytes
        # A parameter without a gradient is in no buffer, and which one it is nobody says.
        if sum(block.size for block in blocks) != whole.shape[1] or all(block.kept is None for block in blocks):
            self.sent_bytes += input_tensor.nbytes
            return self.inner(output_tensor, input_tensor, group, op, async_op)
        if not self._checked:
            _check_dropped(whole, blocks)
            self._checked = True
        packed, reduced = self._room(whole, sum(block.packed for block in blocks))
        self._pack(whole, blocks, packed)
        self.sent_bytes += packed.nbytes
        if packed.numel() > 0:
            self.inner(reduced, packed.view(-1), group, op, False)
        _unpack(reduced, output_tensor, blocks)
        return None

    def _compare_masks(self, group: Any) -> None:
        """Ranks whose samplers count other steps would mix one weight by two masks, and add up other columns."""
        seeds = torch.stack([layer.draw()[0].seed for layer in self._unit.layers])
        told = [torch.empty_like(seeds) for _ in range(group.size())]
        dist.all_gather(told, seeds, group=group)
        others = [rank for rank, other in enumerate(told) if not torch.equal(other, told[0])]
        if others:
            raise RuntimeError(
                f"MixSampler: the masks of {self._unit.layers[0].name!r}: expected the same on every rank, got others "
                f"on ranks {others} of the group than on its first: does every rank's optimizer hold the mixed "
                "weights, and step alike?"
            )

    def _blocks(self, ranks: int) -> list[_Block]:
        blocks = []
        for fsdp_param in self._unit.group.fsdp_params:
            if not fsdp_param.sharded_param.requires_grad:
                continue
            layer = self._layers.get(id(fsdp_param))
            size = fsdp_param._orig_size
            if fsdp_param.fsdp_placement.dim != 0:  # FSDP puts the pieces of its columns one behind the other
                blocks.append(_Block("", 1, size.numel() // ranks, None))
            else:
                rows, width = -(-size[0] // ranks), math.prod(size[1:])
                name = "" if layer is None else layer.name
                blocks.append(_Block(name, rows, width, None if layer is None else _kept(layer)))
        return blocks

    def _room(self, whole: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """For what each rank gets of this one, ``[ranks, size]``, and for their sum."""
        ranks, dtype, device = whole.shape[0], whole.dtype, whole.device
        if device.type == "cpu":
            packed, reduced = self._unit.scratch.room(0, (ranks + 1) * size, dtype, device).split([ranks * size, size])
        else:
            packed, reduced = (
                self.inner.allocate((numel,), dtype=dtype, device=device) for numel in (ranks * size, size)
            )
        return packed.view(ranks, size), reduced

    @staticmethod
    def _pack(whole: Tensor, blocks: list[_Block], packed: Tensor) -> None:
        parts = zip(
            blocks,
            whole.split([block.size for block in blocks], dim=1),
            packed.split([block.packed for block in blocks], dim=1),
            strict=True,
        )
        for block, source, out in parts:
            if block.kept is None:
                out.copy_(source)
            else:
                matrices = source.unflatten(1, (block.rows, block.width))
                _select(matrices, block.kept, out.unflatten(1, (block.rows, len(block.kept))))


def _select(matrices: Tensor, kept: Tensor, out: Tensor) -> None:
    """Columns of ``[ranks, rows, width]``. On a CPU rank by rank: in one call they took ten times as long."""
    if matrices.device.type != "cpu":
        out.copy_(matrices.index_select(2, kept))
        return
    for matrix, room in zip(matrices, out, strict=True):
        torch.index_select(matrix, 1, kept, out=room)


def _unpack(reduced: Tensor, output: Tensor, blocks: list[_Block]) -> None:
    parts = zip(
        blocks,
        reduced.split([block.packed for block in blocks]),
        output.split([block.size for block in blocks]),
        strict=True,
    )
    for block, source, out in parts:
        if block.kept is None:
            out.copy_(source)
        else:
            matrix = out.zero_().view(block.rows, block.width)
            matrix.index_copy_(1, block.kept, source.view(block.rows, len(block.kept)))


def _kept(layer: Sharded) -> Tensor | None:
    """The columns to reduce: those of the one mask that all forwards had since the last reduction."""
    present = layer.gradient_mask()
    forwards, layer.unreduced = layer.unreduced, set()
    draw, gradient = layer.draw()
    if present is None or forwards != {present} or layer.transposed or not draw.by_column or gradient.q == 0:
        return None
    return layer.kept_columns(draw, gradient.q)


def _check_dropped(whole: Tensor, blocks: list[_Block]) -> None:
    """Once: a gradient from outside the layer, of a penalty on its weight say, is not zero where the mask is."""
    start = 0
    for block in blocks:
        if block.kept is not None:
            matrix = whole[:, start : start + block.size].unflatten(1, (block.rows, block.width))
            if matrix.count_nonzero() != matrix.index_select(2, block.kept).count_nonzero():
                raise RuntimeError(
                    f"MixSampler: the gradient of the weight of {block.name!r}: expected zeros in the columns that its "
                    "mask drops, got others: something beside the layer reads its weight, which is Phi between forward "
                    "and backward; use sampler.remove() and a MixSampler made before fully_shard"
                )
        start += block.size
