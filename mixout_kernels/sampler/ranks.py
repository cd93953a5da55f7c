"""What the processes of a group agree on when a sampler is made: its seed, and the targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..modules import MixedLayer
from .seeds import GOLDEN, signed

Checksum = tuple[int, int] | str | None


class _Rank(NamedTuple):
    """What one process tells the others."""

    seed: int
    targets: dict[str, Checksum]


def agree(seed: int, layers: Mapping[str, MixedLayer], group: dist.ProcessGroup | None, same_on_all_ranks: bool) -> int:
    """This process's seed: that of the group's first, or one of its own.

    Every process of the group must call it, one without mixed layers too.

    Raises:
        ValueError: on every process, if a target differs between two of them, or is on the meta device on one; or
            for a group that this process is not in.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("MixSampler: process_group: expected None where torch.distributed is not initialized")
        without_values = {name for name, layer in layers.items() if _is_meta(layer) and not layer.weight.is_meta}
        _check_targets("MixSampler", [_Rank(seed, dict.fromkeys(without_values, "meta"))])
        return seed
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("MixSampler: process_group: expected a group that this process is in")
    ranks = _told(_Rank(seed, _checksums(layers)), group)
    _check_targets("MixSampler", ranks)
    if same_on_all_ranks:
        seed = ranks[0].seed
    return seed if same_on_all_ranks else signed(seed + rank * GOLDEN)


def compare_targets(function: str, layers: Mapping[str, MixedLayer], group: dist.ProcessGroup | None) -> None:
    """
    Raises:
        ValueError: on every process, as :func:`agree`.
    """
    if dist.is_available() and dist.is_initialized():
        _check_targets(function, _told(_Rank(0, _checksums(layers)), group))


def _told(own: _Rank, group: dist.ProcessGroup | None) -> list[_Rank]:
    """What every process of the group tells the others."""
    ranks = [own] * dist.get_world_size(group)
    if len(ranks) > 1:
        dist.all_gather_object(ranks, own, group=group)
    return ranks


def _check_targets(function: str, ranks: list[_Rank]) -> None:
    first: dict[str, tuple[int, Checksum]] = {}
    for rank, (_, targets) in enumerate(ranks):
        for name, checksum in targets.items():
            if isinstance(checksum, str):
                raise ValueError(
                    f"{function}: model: expected the target of {name!r} in memory on every rank, got one on the "
                    f"{checksum} device on rank {rank}: load the pretrained weights before apply_mixout, or call "
                    "shard_targets(model, from_weights=True) once every rank has its piece of them"
                )
            other, expected = first.setdefault(name, (rank, checksum))
            if checksum != expected:
                raise ValueError(
                    f"{function}: model: expected the same target of {name!r} on every rank, got different ones on "
                    f"ranks {other} and {rank}: load the pretrained weights on every rank before apply_mixout; or call "
                    "shard_targets(model, from_weights=True) once every rank has its piece of them (accelerate's "
                    "cpu_ram_efficient_loading); or pass the process_group of the ranks that hold the same layers"
                )


def _checksums(layers: Mapping[str, MixedLayer]) -> dict[str, Checksum]:
    """Of each whole target, by its bits; a shard is another one on every rank, and has none."""
    found: dict[str, Checksum] = {}
    sums: dict[str, Tensor] = {}
    for name, layer in layers.items():
        target = layer.target
        if target is None or type(target) not in (Tensor, torch.nn.Parameter):
            found[name] = None
        elif _is_meta(layer):
            found[name] = "meta"
        else:
            sums[name] = _checksum(target)
    by_device: dict[torch.device, list[str]] = {}
    for name, value in sums.items():
        by_device.setdefault(value.device, []).append(name)
    for names in by_device.values():  # one copy to the host for each device
        for name, (rows, columns) in zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True):
            found[name] = rows, columns
    return found


def _is_meta(layer: MixedLayer) -> bool:
    return layer.target is not None and layer.target.is_meta


def _checksum(target: Tensor) -> Tensor:
    """Two sums of a matrix's bits in int64, which wraps around: weighted by the row's number and by the column's."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = target.detach().contiguous().view(integers[target.element_size()])
    weights = [2 * torch.arange(size, device=bits.device) + 1 for size in bits.shape]
    return torch.stack([
        (bits.sum(1, dtype=torch.int64) * weights[0]).sum(),
        (bits.sum(0, dtype=torch.int64) * weights[1]).sum(),
    ])  # fmt: skip
