"""Targets where their weights lie."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from ...modules import MixedLayer
from ...pieces import distributed_like, is_distributed, own_piece, plain_copy


def is_sharded(layer: MixedLayer) -> bool:
    """Whether its target is a DTensor, of the same placements as its weight."""
    return is_distributed(layer.target)


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of Parameters that several modules hold: mixed for one of them, they would be mixed for all."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, modules in held.items() if modules > 1}


def place(layer: MixedLayer, piece: Tensor) -> None:
    """Makes a copy of this piece, of the target's dtype, the layer's target."""
    weight: Any = layer.weight
    assert layer.target is not None
    copied = plain_copy(piece, layer.target.dtype, weight.device)
    layer.__dict__["target"] = distributed_like(copied, weight)


def place_own_piece(layer: MixedLayer) -> None:
    """Of the whole target, which is let go."""
    if layer.target is not None and not is_sharded(layer):
        place(layer, own_piece(layer.target, layer.weight))


def make_whole(layer: MixedLayer) -> None:
    """Gathers the target again; every rank must call it."""
    target: Any = layer.target
    if is_sharded(layer):
        layer.__dict__["target"] = target.full_tensor()
