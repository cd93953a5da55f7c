"""FSDP2's all-gather of the kept columns alone, where every rank holds the whole target: the others are u."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ...modules import MixConv1D, MixedLayer
from . import placing
from .gathering import Gathered


class GatheredKept(Gathered):
    """A layer of which the kept columns of Phi are gathered, and put into a copy of its target."""

    def place_target(self) -> None:
        placing.make_whole(self.layer)

    def _own_target(self) -> Tensor | None:
        target = self.layer.target
        return None if target is None else target[self.piece.slices]

    def pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        rows, kept = self._rows(mp_policy.param_dtype), None
        draw, _ = self.draw()
        if self.unsharded is not None and draw.by_column:
            kept = self.kept_columns(draw, draw.p)
            rows = rows.index_select(1, kept)
        self.fsdp_param.all_gather_outputs = []  # it had as many columns as the last mask kept
        self.sent_bytes += rows.nbytes
        return (rows,), kept

    def post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        (gathered,) = all_gather_outputs
        target, kept = self.layer.target, metadata
        assert target is not None
        phi = torch.empty(target.shape, dtype=gathered.dtype, device=gathered.device) if out is None else out
        # FSDP writes into memory that autograd has saved, as it does itself.
        with torch.no_grad(), _unsafe_preserve_version_counter(phi):
            if kept is None:
                phi.copy_(gathered)
            else:
                phi.copy_(target)
                phi.index_copy_(1, kept, gathered)
        return (phi, (phi,)) if out is None else None


def reason_against(layer: MixedLayer, fsdp_param: Any) -> str | None:
    """Why all columns of this layer must be gathered, or None."""
    if layer.target is None or isinstance(layer, MixConv1D):
        return "its columns are not those of its weight's memory, or it has no target"
    if fsdp_param.is_dtensor:
        return "its weight is sharded by tensor parallelism too"
    rows, ranks = fsdp_param.sharded_param.shape[0], fsdp_param.mesh_info.shard_mesh_size
    if fsdp_param.fsdp_placement.dim != 0 or rows % ranks:
        return f"its {rows} rows are not sharded evenly over {ranks} ranks"
    return None
