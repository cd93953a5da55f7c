"""Phi of whole models: mixed ahead for all layers in one launch, and never used when it is not of this moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..draws import Draw
from ..modules import MixedLayer
from . import host_memory
from .layers import LayerDraw
from .seeds import Seeds
from .snapshot import snapshot


class Phi:
    """One layer's mixed weight, and what it was made from.

    That is: the draw (seed, p, strides) and its number, the compute dtype, the kernels asked for, and a snapshot of
    weight and target.
    """

    def __init__(self, layer: MixedLayer, draw: LayerDraw) -> None:
        self.layer = layer
        self.draw = draw
        self.mixed: Tensor | None = None
        self.backend: str | None = None  # that mixes it; None where mixing ahead does not apply
        self.dtype: torch.dtype | None = None  # the compute dtype of the last forward
        self.kernels = backends.Choice(None, None)  # of the ``kernels`` context of the last forward
        self.made_by: Draw | None = None
        self.parameter: nn.Parameter | None = None
        self._snapshot: Any = None
        self._number: int | None = None  # of its draw
        self.look_at_weight()

    def look_at_weight(self) -> None:
        """Between forwards: under FSDP a layer has other Parameters within them.

        Phi of a shard (a DTensor, or a piece of a flat parameter) would undo what FSDP saves, and one of a computed
        weight (a parametrization) would not outlive a forward.
        """
        weight = self.layer._parameters.get("weight")
        self.parameter = weight if type(weight) is nn.Parameter and weight.dim() == 2 else None

    @property
    def is_whole(self) -> bool:
        return self.parameter is not None and self.layer._parameters.get("weight") is self.parameter

    def is_chosen_for(self, dtype: torch.dtype, draw: Draw, kernels: backends.Choice) -> bool:
        """Whether backend and room are those of such a call, and weight and target lie where they lay."""
        same = self.made_by is draw and self.dtype == dtype and self.kernels == kernels
        return same and self._snapshot.is_place_of(*self._tensors())

    def is_of(self, number: int) -> bool:
        """Whether it is of the ``number``-th draw and of the present values."""
        return self._number == number and self._snapshot.has_values_of(*self._tensors())

    def choose(self, dtype: torch.dtype, draw: Draw, kernels: backends.Choice, wanted: bool | None) -> None:
        """Picks the backend that mixes this layer, and makes room for its Phi.

        With target zero and decisions by column there is none: the products then need the kept columns alone.
        """
        weight, target = self._tensors()
        assert weight is not None
        self.layer.check_target(weight)
        self.dtype, self.kernels, self.made_by, self._number = dtype, kernels, draw, None
        self._snapshot = snapshot(weight, target)
        backend = "reference"
        if 0 < draw.p < 1 and weight.numel() > 0 and not (target is None and draw.by_column):
            target_dtype = weight.dtype if target is None else target.dtype
            backend = backends.choose(*kernels, weight.device.type, weight.dtype, target_dtype, dtype)
        if backend != "reference" and wanted is None and kernels.schedule != "staged":
            backend = backend if backends.load(backend).premixing_pays(dtype) else "reference"
        if backend == "reference":
            self.backend = self.mixed = None
            return
        self.backend = backend
        room = dtype, weight.device, self.layer.matrix(weight).shape
        if self.mixed is None or (self.mixed.dtype, self.mixed.device, self.mixed.shape) != room:
            # Made in inference mode it could never be saved for backward.
            with torch.inference_mode(False):
                self.mixed = torch.empty_like(self.layer.matrix(weight.detach()), dtype=dtype)

    def made_at(self, number: int) -> None:
        self._number = number
        self._snapshot.note_values(*self._tensors())

    def still_fits(self) -> bool:
        """Whether the choice of the last forward holds: a look at every layer after every step."""
        if not self.is_whole or self.parameter is None or not self._snapshot.is_place_of(*self._tensors()):
            return False
        return self.draw.now(self.layer.matrix(self.parameter).shape)[0] is self.made_by

    def _tensors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.layer._parameters.get("weight"), self.layer.target


class MixedAhead:
    """Phi of all layers of a sampler."""

    def __init__(self, phis: list[Phi], seeds: Seeds, wanted: bool | None, host_targets: bool) -> None:
        self.phis = phis
        self.wanted = wanted  # None: where it pays
        self.host_targets = host_targets
        self._seeds = seeds
        self._batches: list[_Batch] | None = None

    @property
    def nbytes(self) -> int:
        return sum(phi.mixed.nbytes for phi in self.phis if phi.mixed is not None)

    def operand(self, phi: Phi, dtype: torch.dtype, draw: Draw) -> Tensor | None:
        """This layer's Phi in the compute dtype, of this moment; None where the call is to mix by itself."""
        if self.wanted is False or not phi.is_whole:
            return None
        kernels = backends.selected(None, None)
        if not phi.is_chosen_for(dtype, draw, kernels):
            phi.choose(dtype, draw, kernels, self.wanted)
            self._batches = None
        if phi.backend is not None and not phi.is_of(self._seeds.draws):
            self._mix(self._batch([phi]))
        return phi.mixed

    def is_ready(self, phi: Phi, dtype: torch.dtype, draw: Draw, kernels: backends.Choice) -> bool:
        """Whether ``phi.mixed``, as it is, is the :meth:`operand` of such a call."""
        if self.wanted is False or not phi.is_whole:
            return phi.mixed is None
        return phi.is_chosen_for(dtype, draw, kernels) and (phi.backend is None or phi.is_of(self._seeds.draws))

    def refresh(self) -> None:
        """Mixes all layers anew that have been called: the draw or the weights are other ones.

        One launch for each backend, device and dtype. Nothing is decided again where nothing but values has changed.
        """
        if self.wanted is False:
            return
        for phi in self.phis:
            if phi.backend is None:
                phi.look_at_weight()
            elif not phi.still_fits():
                phi.look_at_weight()
                self._batches = None
                if phi.parameter is None or phi.dtype is None:
                    phi.backend = phi.mixed = phi.made_by = None
                else:
                    draw, _ = phi.draw.now(phi.layer.matrix(phi.parameter).shape)
                    phi.choose(phi.dtype, draw, phi.kernels, self.wanted)
        if self._batches is None:
            self._batches = self._find_batches()
        for batch in self._batches:
            self._mix(batch)

    def _find_batches(self) -> list[_Batch]:
        batches: dict[Any, list[Phi]] = {}
        for phi in self.phis:
            if phi.backend is not None and phi.parameter is not None:
                target = phi.layer.target
                dtypes = phi.parameter.dtype, None if target is None else target.dtype, phi.dtype
                batches.setdefault((phi.backend, phi.parameter.device, dtypes), []).append(phi)
        return [self._batch(batch) for batch in batches.values()]

    def _batch(self, phis: list[Phi]) -> _Batch:
        return _Batch(phis, None if self.host_targets else _mixer(phis, _targets(phis)))

    def _mix(self, batch: _Batch) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if batch.mix is not None:
                batch.mix()
            else:
                for phis, targets in _pieces(batch.phis):
                    _mixer(phis, targets)()
            # Written behind autograd's back: a backward that needs the old Phi must fail, not use the new.
            torch.autograd.graph.increment_version([phi.mixed for phi in batch.phis if phi.mixed is not None])
        for phi in batch.phis:
            phi.made_at(self._seeds.draws)


class _Batch(NamedTuple):
    """Layers that one launch mixes, and what starts it for as long as their tensors lie where they lie.

    ``mix`` is None where the targets are in host memory, and on the device for the moment alone.
    """

    phis: list[Phi]
    mix: Callable[[], None] | None


def _mixer(phis: list[Phi], targets: list[Tensor | None]) -> Callable[[], None]:
    outs = [phi.mixed for phi in phis if phi.mixed is not None]
    draws = [phi.made_by for phi in phis if phi.made_by is not None]
    with torch.inference_mode(False), torch.no_grad():
        weights = [phi.layer.matrix(w) for phi in phis if (w := phi.parameter) is not None]
    return backends.load(str(phis[0].backend)).mixer(outs, weights, targets, draws)


def _pieces(phis: list[Phi]) -> Iterator[tuple[list[Phi], list[Tensor | None]]]:
    """Layers to mix in one launch, and their targets, which lie in host memory, on the device."""
    targets = _targets(phis)
    cuts = host_memory.pieces(targets)
    device = phis[0].parameter.device if phis[0].parameter is not None else torch.device("cpu")
    present = host_memory.on_device([targets[cut] for cut in cuts], device)
    yield from zip([phis[cut] for cut in cuts], present, strict=True)


def _targets(phis: list[Phi]) -> list[Tensor | None]:
    return [None if (t := phi.layer.target) is None else phi.layer.matrix(t) for phi in phis]
