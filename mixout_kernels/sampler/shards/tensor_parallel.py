"""Tensor parallelism: each rank computes with the piece of the weight that it holds, and its part of the mask.

    colwise    weight Shard(0)    x whole, its gradient partial     y = x Phi_local^T + b_local, sharded as its features
    rowwise    weight Shard(1)    x sharded as its features         y = x_local Phi_local^T partial, + b after the sum

A mask is a function of an index, so that of a piece is that of the whole with an offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...backends import MixedWeight
from ...draws import Draw, GradientMask
from ...functional import compute_dtype, sampled_linear
from ...modules import MixConv1D, MixedLayer
from ...pieces import Piece


def check_plan(name: str, layer: MixedLayer, mesh: Any, placements: Sequence[Any]) -> None:
    """
    Raises:
        NotImplementedError: for a plan other than ColwiseParallel and RowwiseParallel, or a Conv1D.
    """
    from torch.distributed.tensor import Shard

    if mesh.ndim == 1 and placements[0] in (Shard(0), Shard(1)) and not isinstance(layer, MixConv1D):
        return
    raise NotImplementedError(
        f"MixSampler: model: expected {name!r} to be a Linear with the plan ColwiseParallel, its weight being "
        f"(Shard(dim=0),), or RowwiseParallel, (Shard(dim=1),), over a mesh of one dimension, got a "
        f"{type(layer).__name__} with {tuple(placements)} over a mesh of {' x '.join(map(str, mesh.shape))}"
    )


def linear(
    input: Tensor,
    weight: Any,
    target: Tensor | None,
    bias: Any,
    draw: Draw,
    gradient: GradientMask,
    *,
    weight_is_phi: bool,
) -> Tensor:
    """The output of the layer as a DTensor; ``target`` is this rank's piece, ``draw`` that of the whole weight."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, (placement,) = weight.device_mesh, weight.placements
    colwise = placement == Shard(0)
    features = Shard(input.dim() - 1)
    inside, its_gradient = (Replicate(), Partial()) if colwise else (features, features)
    x: Any = input
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    x = x.redistribute(placements=[inside]).to_local(grad_placements=[its_gradient])
    w = weight.to_local(grad_placements=[placement])
    operand = w.detach().to(compute_dtype(x)) if weight_is_phi else None
    phi = MixedWeight(w, target, operand, Piece.of(weight).draw(draw))
    own_bias = bias.to_local(grad_placements=[placement]) if colwise and bias is not None else None
    y = sampled_linear(x, phi, own_bias, gradient)[0]
    if colwise:
        return DTensor.from_local(y, mesh, [features], run_check=False)
    sum_of_ranks = DTensor.from_local(y, mesh, [Partial()], run_check=False)
    return sum_of_ranks if bias is None else sum_of_ranks.redistribute(placements=[Replicate()]) + bias
