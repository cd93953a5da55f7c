"""Targets that lie where their weights lie: sharded as FSDP2 and tensor parallelism shard those."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..checkpoints import Pretrained, Source
from ..modules import MixedLayer, frozen_copy
from ..pieces import distributed_like, is_distributed, local, own_piece
from ..sampler.ranks import compare_targets
from ..sampler.shards import placing
from ..sampler.shards.units import reshard


def shard_targets(
    model: nn.Module,
    *,
    from_weights: bool = False,
    targets: Source | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Targets that lie where their weights lie: for each piece of a weight, a DTensor, the piece of the target.

    After ``fully_shard``, ``parallelize_module`` or accelerate's ``prepare``, on every rank. A
    :class:`mixout_kernels.MixSampler` that is made then does it by itself; call it

    - for a sampler that was made before the model was sharded;
    - with ``from_weights=True`` or ``targets``, before the sampler is made, where not every rank has the whole targets:
      a model that went to its ranks by ``to_empty`` and a sharded checkpoint, or under accelerate's
      ``cpu_ram_efficient_loading``. No rank has a whole target then, not for a moment.

    Targets of tied weights, and of weights that are no DTensors, stay whole.

    Args:
        model: with mixout, between an optimizer's step and the next forward.
        from_weights: the targets are the present weights, so these must be the pretrained ones. Each rank copies its
            own piece.
        targets: as in :func:`mixout_kernels.apply_mixout`. Of a safetensors file each rank reads its own rows alone.
        process_group: whose ranks compare the whole targets that they have; None is every process.

    Raises:
        ValueError: for a model where no mixed layer with a target has a DTensor weight; for whole targets that are on
            the meta device on a rank, or differ between two; for ``from_weights`` and ``targets`` together; for an
            entry of ``targets`` that is missing or of another shape.
        TypeError, FileNotFoundError: for ``targets``, as :func:`mixout_kernels.apply_mixout`.
        NotImplementedError: where the model has a sampler, as :class:`mixout_kernels.MixSampler` raises it.
    """
    checks.flag("shard_targets", "from_weights", from_weights)
    if from_weights and targets is not None:
        raise ValueError(
            f"shard_targets: targets: expected None with from_weights=True, got a {type(targets).__name__}"
        )
    if dist.is_available() and dist.is_initialized():
        reshard(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MixedLayer) and m.target is not None}
    if not any(is_distributed(layer.weight) for layer in layers.values()):
        raise ValueError(
            "shard_targets: model: expected a mixed layer with a target whose weight is a DTensor, got none among "
            f"{len(layers)}: call it after fully_shard or parallelize_module"
        )
    pretrained = None if targets is None else Pretrained("shard_targets", targets, model)
    if pretrained is None and not from_weights:
        compare_targets("shard_targets", layers, process_group)
    shared = placing.shared_weights(model)
    of_shared: dict[int, Tensor] = {}  # tied weights go on sharing one
    for name, layer in layers.items():
        weight: Any = layer.weight
        if is_distributed(weight) and id(weight) not in shared:
            if pretrained is not None:
                piece = _found(pretrained, name, weight)
            else:
                piece = local(weight) if from_weights else own_piece(_target(layer), weight)
            placing.place(layer, piece)
        elif pretrained is not None or from_weights:
            if id(weight) not in of_shared:
                source = weight if pretrained is None else _found(pretrained, name, weight)
                of_shared[id(weight)] = _whole(source, weight, _target(layer).dtype)
            layer.__dict__["target"] = of_shared[id(weight)]
    for sampler in {layer.slot.sampler for layer in layers.values() if layer.slot is not None}:
        sampler.shard(model)


def _target(layer: MixedLayer) -> Tensor:
    assert layer.target is not None
    return layer.target


def _found(pretrained: Pretrained, name: str, weight: Tensor) -> Tensor:
    found = pretrained.find(weight)
    if found is None:
        raise ValueError(
            f"shard_targets: targets: expected an entry for the weight of {name!r}, got {pretrained.summary}"
        )
    return found


def _whole(source: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen copy of the whole tensor of which ``source`` is this rank's piece, as the weight is its own."""
    whole: Any = source
    if is_distributed(weight):
        whole = source if is_distributed(source) else distributed_like(source, weight)
        whole = whole.full_tensor()
    return frozen_copy(whole).to(weight.device, dtype)
