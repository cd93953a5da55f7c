"""The piece of a distributed tensor that lies on this rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .draws import Draw


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor. Their module is imported with the first one, which takes long."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor, not differentiable; any other tensor as it is."""
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def own_piece(whole: Tensor, weight: Tensor) -> Tensor:
    """Of a tensor of the weight's shape, whole or sharded alike, what belongs to this rank's piece of the weight."""
    if not is_distributed(weight):
        return whole
    if is_distributed(whole):
        alike: Any = whole
        if (alike.device_mesh, alike.placements) == (weight.device_mesh, weight.placements):  # type: ignore[attr-defined]
            return local(whole)
        whole = alike.full_tensor()
    return whole[Piece.of(weight).slices]


def distributed_like(piece: Tensor, weight: Any) -> Tensor:
    """A DTensor with this piece, of the shape and with the placements of ``weight``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        piece, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


class Piece(NamedTuple):
    """A block of a matrix: its shape, and the index of its first entry."""

    shape: tuple[int, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Piece:
        """This rank's piece of a DTensor: always a block, also where FSDP2 shards what tensor parallelism sharded."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        return cls(*compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(first, first + size) for first, size in zip(self.first, self.shape, strict=True))

    def t(self) -> Piece:
        return Piece(self.shape[::-1], self.first[::-1])

    def draw(self, whole: Draw) -> Draw:
        """The decisions for this block, of those for the whole matrix."""
        offset = sum(first * stride for first, stride in zip(self.first, whole.strides, strict=True))
        return Draw(whole.seed, whole.p, whole.strides, whole.offset + offset)

    def columns(self, whole: Draw, q: float) -> Draw:
        """One decision for each column of this block, against another threshold; ``whole`` decides by column."""
        return Draw(whole.seed, q, (1,), whole.offset + self.first[1])


def plain_copy(piece: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A frozen copy that keeps nothing larger than itself alive."""
    return torch.empty(piece.shape, dtype=dtype, device=device).copy_(piece.detach())
