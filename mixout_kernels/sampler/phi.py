"""Phi of whole models: mixed ahead for all layers in one launch, and never used when it is not of this moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import backends
from ..draws import Draw
from ..modules import MixedLayer
from . import host_memory
from .layers import LayerDraw
from .seeds import Seeds


class Phi:
    """One layer's mixed weight, and what it was made from.

    That is: the draw (seed, p, strides) and its number, the compute dtype, the kernels asked for, and of weight and
    target the storage, the address in it and autograd's version.
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
        self._sources: tuple[Any, ...] = ()
        self._moment: tuple[Any, ...] = ()
        self._addresses: tuple[Any, ...] = ()
        self._storages: list[StorageWeakRef] = []
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
        return self.made_by is draw and self._sources == (dtype, kernels, *map(_place, self._tensors()))

    def is_of(self, number: int) -> bool:
        """Whether it is of the ``number``-th draw and of the present values."""
        return self._moment == (number, *map(_version, self._tensors()))

    def choose(self, dtype: torch.dtype, draw: Draw, kernels: backends.Choice, wanted: bool | None) -> None:
        """Picks the backend that mixes this layer, and makes room for its Phi.

        With target zero and decisions by column there is none: the products then need the kept columns alone.
        """
        weight, target = self._tensors()
        assert weight is not None
        self.dtype, self.kernels, self.made_by, self._moment = dtype, kernels, draw, ()
        self._sources = dtype, kernels, *map(_place, (weight, target))
        self._addresses = tuple(map(_address, (weight, target)))
        # An address alone proves nothing: .bfloat16() and .float() in a row may end where they began. While a storage
        # is weakly referred to, no other one gets its identity.
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in (weight, target) if t is not None]
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
        self._moment = number, *map(_version, self._tensors())

    def still_fits(self) -> bool:
        """Whether the choice of the last forward holds: a look at addresses, for every layer after every step.

        Where it overlooks another storage at the same address, the next forward does not.
        """
        if self.parameter is None or not self.is_whole:
            return False
        addresses = _address(self.parameter), _address(self.layer.target)
        shape = self.layer.matrix(self.parameter).shape
        return self._addresses == addresses and self.draw.now(shape)[0] is self.made_by

    def _tensors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.layer._parameters.get("weight"), self.layer.target


def _place(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.untyped_storage()._cdata, tensor.data_ptr())


def _address(tensor: Tensor | None) -> tuple[int, torch.dtype, torch.Size] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape)


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version


class MixedAhead:
    """Phi of all layers of a sampler."""

    def __init__(self, phis: list[Phi], seeds: Seeds, wanted: bool | None, host_targets: bool) -> None:
        self.phis = phis
        self.wanted = wanted  # None: where it pays
        self.host_targets = host_targets
        self._seeds = seeds
        self._batches: list[list[Phi]] | None = None

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
            self._mix([phi])
        return phi.mixed

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

    def _find_batches(self) -> list[list[Phi]]:
        batches: dict[Any, list[Phi]] = {}
        for phi in self.phis:
            if phi.backend is not None and phi.parameter is not None:
                target = phi.layer.target
                dtypes = phi.parameter.dtype, None if target is None else target.dtype, phi.dtype
                batches.setdefault((phi.backend, phi.parameter.device, dtypes), []).append(phi)
        return list(batches.values())

    def _mix(self, batch: list[Phi]) -> None:
        backend = backends.load(str(batch[0].backend))
        with torch.inference_mode(False), torch.no_grad():
            for phis, targets in self._pieces(batch):
                outs = [phi.mixed for phi in phis if phi.mixed is not None]
                draws = [phi.made_by for phi in phis if phi.made_by is not None]
                weights = [phi.layer.matrix(w) for phi in phis if (w := phi.parameter) is not None]
                backend.mixout_list(outs, weights, targets, draws)
                # Written behind autograd's back: a backward that needs the old Phi must fail, not use the new.
                torch.autograd.graph.increment_version(outs)
        for phi in batch:
            phi.made_at(self._seeds.draws)

    def _pieces(self, batch: list[Phi]) -> Iterator[tuple[list[Phi], list[Tensor | None]]]:
        """Layers to mix in one launch, and their targets on the device: all at once if they are there."""
        targets = [None if (t := phi.layer.target) is None else phi.layer.matrix(t) for phi in batch]
        if not self.host_targets:
            yield batch, targets
            return
        cuts = host_memory.pieces(targets)
        device = batch[0].parameter.device if batch[0].parameter is not None else torch.device("cpu")
        present = host_memory.on_device([targets[cut] for cut in cuts], device)
        yield from zip([batch[cut] for cut in cuts], present, strict=True)
