"""FSDP2: each rank mixes its own rows of w and u, and what is gathered is Phi, in the compute dtype.

FSDP2 asks a sharded tensor that has ``fsdp_pre_all_gather`` what to gather, and ``fsdp_post_all_gather`` what to make
of it. Both are set on the local tensor of the sharded Parameter: a subclass of Tensor would be in every state_dict and
in every operation of the optimizer. So the unsharded Parameter *is* Phi, in forward and in backward, and its gradient,
which the layer masks and scales, is reduced as any other.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import backends, reference
from ...draws import Draw, GradientMask
from ...functional import kept_indices
from ...modules import MixConv1D, MixedLayer
from ...pieces import Piece, local
from . import placing
from .scratch import Scratch

# The sampler's draw, p and mask; None for the weight itself.
Mixed = tuple[int, float, str] | None
_PRE, _POST = "fsdp_pre_all_gather", "fsdp_post_all_gather"


class LayerDraw(Protocol):
    """A layer's decisions, as its sampler draws them."""

    seed: Tensor

    def now(self, shape: torch.Size) -> tuple[Draw, GradientMask]: ...

    def follow(self, device: torch.device) -> None: ...


class Sampler(Protocol):
    @property
    def draws(self) -> int: ...


class Sharded:
    """A mixed layer whose weight FSDP2 shards: its piece and its draw."""

    def __init__(self, name: str, layer: MixedLayer, fsdp_param: Any, draw: LayerDraw, sampler: Sampler) -> None:
        self.name = name
        self.layer = layer
        self.fsdp_param = fsdp_param
        self.kernels = backends.Choice(None, None)  # of the last forward
        self.unreduced: set[Any] = set()  # the gradient masks of forwards since gradients were last reduced
        self.transposed = isinstance(layer, MixConv1D)
        piece, shape = Piece.of(self.weight), self.weight.shape
        self.piece = piece.t() if self.transposed else piece  # of [out, in]
        self._shape = torch.Size(reversed(shape)) if self.transposed else shape
        self._draw = draw
        self._sampler = sampler

    @property
    def weight(self) -> Tensor:
        """The sharded Parameter, which the optimizer holds."""
        return self.fsdp_param.sharded_param

    def draw(self) -> tuple[Draw, GradientMask]:
        """Of the whole weight ``[out, in]``."""
        device = self.weight.device
        if self._draw.seed.device != device:
            self._draw.follow(device)
        return self._draw.now(self._shape)

    def kept_columns(self, draw: Draw, q: float) -> Tensor:
        """Of this rank's piece, the columns that a draw by column of the whole weight keeps at this threshold."""
        along = self.piece.columns(draw, q)
        return kept_indices(along, self.piece.shape[1], fixed_number=draw.seed.device.type != "cpu")

    def gradient_mask(self) -> Any:
        """A name for the mask that a forward now gives the weight's gradient; None where it is whole."""
        layer = self.layer
        return (self._sampler.draws, layer.p, layer.grad_p, layer.mask) if layer.training else None

    def prepare(self) -> None:
        """Before FSDP gathers for a forward."""
        self.kernels = backends.selected(None, None)
        if torch.is_grad_enabled() and len(self.unreduced) < 2:  # two are as many as any
            self.unreduced.add(self.gradient_mask())

    def place_target(self) -> None:
        pass

    def attach(self) -> None:
        pass

    def detach(self) -> None:
        pass

    def is_stale(self) -> bool:
        """Whether what lies unsharded is not what a forward needs now."""
        return False


class Gathered(Sharded):
    """One whose Phi is gathered in place of its weight."""

    unsharded: Mixed | str = "nothing"  # what the last gather was made for
    scratch: Scratch  # where its rows are mixed, from ``start`` on: FSDP copies those of a unit before it asks another
    start = 0
    sent_bytes = 0  # what this rank gave to all gathers so far

    def wanted(self) -> Mixed:
        layer = self.layer
        return (self._sampler.draws, layer.p, layer.mask) if layer.training and layer.p > 0 else None

    def is_stale(self) -> bool:
        return self.unsharded != self.wanted()

    def place_target(self) -> None:
        placing.place_own_piece(self.layer)

    def attach(self) -> None:
        """Again before every forward: ``_apply`` and ``load_state_dict(assign=True)`` bring another local tensor."""
        shard = self.fsdp_param._sharded_local_tensor
        if _PRE not in shard.__dict__:
            setattr(shard, _PRE, self.pre_all_gather)
            setattr(shard, _POST, self.post_all_gather)
            if not hasattr(self.fsdp_param, "_extensions_data"):
                self.fsdp_param._init_extensions()  # which FSDP itself does before its first forward alone

    def detach(self) -> None:
        for name in (_PRE, _POST):
            self.fsdp_param._sharded_local_tensor.__dict__.pop(name, None)

    def pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What this rank contributes: its rows, padded to as many as the first rank has, in the compute dtype."""
        rows = self._rows(mp_policy.param_dtype)
        self.sent_bytes += rows.nbytes
        return (rows,), None

    def _rows(self, compute_dtype: torch.dtype | None) -> Tensor:
        shard = local(self.weight)
        dtype = compute_dtype or shard.dtype
        self.unsharded = self.wanted()
        padded = self.fsdp_param.padded_sharded_param_size
        if self.unsharded is None and shard.shape == padded:
            return shard.to(dtype)
        contribution = self.scratch.room(self.start, padded.numel(), dtype, shard.device).view(padded)
        rows, padding = contribution[: shard.shape[0]], contribution[shard.shape[0] :]
        padding.zero_()
        if self.unsharded is None:
            rows.copy_(shard)
        else:
            matrix, target = self.layer.matrix, self._own_target()
            u = None if target is None else matrix(target)
            mix(matrix(rows), matrix(shard), u, self.piece.draw(self.draw()[0]), self.kernels)
        return contribution

    def post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The buffer of the gather is the unsharded Parameter's memory, now and in all later gathers."""
        return (all_gather_outputs[0], ()) if out is None else None

    def check(self, layer: nn.Module, _: Any) -> None:
        """Before the layer's forward, and after FSDP's own hook where it was given the layer itself."""
        if torch.compiler.is_compiling() or not self.is_stale():  # compiled, a draw's number would become a guard
            return
        raise RuntimeError(
            f"{type(layer).__name__} {self.name!r}: expected a weight that was gathered for "
            f"{_described(self.wanted())}, got one for {_described(self.unsharded)}: it was gathered before train(), "
            "eval() or advance(); call reshard() on the module that fully_shard was given"
        )

    def check_backward(self, layer: nn.Module, _: Any, output: Any) -> None:
        """Before the backward of a forward: FSDP has gathered anew, or keeps what a later forward has gathered."""
        if torch.compiler.is_compiling() or not (isinstance(output, Tensor) and output.requires_grad):
            return
        forward = self.unsharded

        def check(_: Tensor) -> None:
            if self.unsharded != forward:
                raise RuntimeError(
                    f"{type(layer).__name__} {self.name!r}: expected in backward the weight of its forward, that of "
                    f"{_described(forward)}, got that of {_described(self.unsharded)}: call train(), eval(), advance() "
                    "and forwards in another mode after backward"
                )

        output.register_hook(check)

    def _own_target(self) -> Tensor | None:
        target = self.layer.target
        return None if target is None else local(target)


def mix(out: Tensor, weight: Tensor, target: Tensor | None, draw: Draw, kernels: backends.Choice) -> None:
    """Writes Phi of a piece ``[out, in]``, rounded once, into ``out``."""
    target_dtype = weight.dtype if target is None else target.dtype
    chosen = "reference"
    if draw.p < 1 and weight.numel() > 0:
        chosen = backends.choose(*kernels, weight.device.type, weight.dtype, target_dtype, out.dtype)
    if chosen == "reference":
        out.copy_(reference.mixed_weight(weight, target, None, draw, GradientMask.of(draw.p), out.dtype))
    else:
        backends.load(chosen).mixout_list([out], [weight], [target], [draw])


def _described(mixed: Mixed | str) -> str:
    if mixed is None:
        return "evaluation"
    return mixed if isinstance(mixed, str) else f"draw {mixed[0]} with p={mixed[1]} and mask={mixed[2]!r}"
