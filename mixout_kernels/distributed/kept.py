"""Which part of each Parameter's gradient the present masks of a sampler keep; the rest is zero, on every rank."""

from __future__ import annotations

from collections.abc import Hashable, KeysView
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..draws import Draw
from ..functional import decisions, kept_indices
from ..gradient_masks import Drawn, GradientMasks, Place
from ..modules import MixConv1D
from ..sampler import MixSampler
from ..sampler.slot import Slot


@dataclass(frozen=True)
class Kept:
    """A gradient is zero but for ``index`` along ``axis``."""

    axis: int
    index: Tensor

    def shape_in(self, parameter: Tensor) -> list[int]:
        """The shape of what is kept of the parameter's gradient."""
        shape = list(parameter.shape)
        shape[self.axis] = len(self.index)
        return shape


class _Mask(Protocol):
    def draw(self, parameter: Tensor) -> Draw | None:
        """The present draw of the gradient's mask in the parameter's memory layout; None where nothing is masked.

        Nor where the host cannot know a width: on a GPU only dw by column has one, that of the kernels.
        """


class _OfLayer(NamedTuple):
    """dw of a mixed layer."""

    slot: Slot

    def draw(self, parameter: Tensor) -> Draw | None:
        layer = self.slot.layer
        if layer.slot is not self.slot or not layer.training:
            return None
        draw, gradient = self.slot.draw.now(layer.matrix(parameter).shape)
        draw = draw.at(gradient.q)
        if not (draw.by_column or _host_knows(parameter)):
            return None
        return draw.t() if isinstance(layer, MixConv1D) else draw


class _OfHook(NamedTuple):
    """A gradient that a hook of apply_graddrop masks, whoever makes it."""

    masks: GradientMasks
    sampler: MixSampler
    place: Place
    hook: Drawn

    def draw(self, parameter: Tensor) -> Draw | None:
        drawn = self.masks.sampler is self.sampler and self.place.module.training
        return self.hook.draw(parameter) if drawn and _host_knows(parameter) else None


class _OfBlock(NamedTuple):
    """All gradients of a block that trains in some steps only."""

    masks: GradientMasks
    sampler: MixSampler
    place: Place
    block: str

    def draw(self, parameter: Tensor) -> Draw | None:
        on = self.masks.sampler is not self.sampler or not self.masks.is_off(self.block)
        if on or not self.place.module.training:
            return None
        return Draw(parameter.new_empty(0, dtype=torch.int64), 1.0, (0,) * parameter.dim())


class KeptParts:
    """For each Parameter of a sampler's model, what its present mask keeps of its gradient.

    Attributes:
        names: of all Parameters that require grad.
        reasons: why a gradient that has a mask is never cut, by name.
    """

    def __init__(self, sampler: MixSampler) -> None:
        model = sampler.model
        assert model is not None, "a sampler is held by its model"
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.reasons: dict[str, str] = {}
        self._sampler = sampler
        self._masks: dict[Tensor, list[_Mask]] = {}
        self._found: dict[Hashable, Kept | None] = {}  # of the present draw
        self._number = -1
        held: dict[Tensor, list[Place]] = {}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter in self.names:
                    held.setdefault(parameter, []).append(Place(module, attribute))
        of_hooks = _of_hooks(sampler)
        of_layers = {slot.layer: _OfLayer(slot) for slot in sampler.slots}
        for tensor, name in self.names.items():
            masks: list[_Mask] = [of_hooks[place] for place in held[tensor] if place in of_hooks][:1]
            others = [] if masks else [place for place in held[tensor] if place.module not in of_layers]
            if not masks:
                masks = [of_layers[m] for m, attribute in held[tensor] if attribute == "weight" and m in of_layers]
            if masks and others:
                self.reasons[name] = f"{type(others[0].module).__name__} holds it too"
            elif masks and not tensor.is_contiguous():
                self.reasons[name] = "it is not contiguous"
            elif masks:
                self._masks[tensor] = masks

    @property
    def parameters(self) -> KeysView[Tensor]:
        """Those whose gradients have a mask."""
        return self._masks.keys()

    def draw(self, parameter: Tensor) -> Draw | None:
        """The present draw of its gradient's mask, None for a gradient that is whole."""
        draws = [mask.draw(parameter) for mask in self._masks.get(parameter, ())]
        if not draws or any(draw is None or _key(draw) != _key(draws[0]) for draw in draws):
            return None  # of layers with a tied weight and different masks the sum of two gradients is whole
        return draws[0]

    def describe(self, parameter: Tensor) -> str | None:
        """In words, what the present mask keeps; None for a gradient without a mask."""
        kept, draw = self.of(parameter), self.draw(parameter)
        if kept is not None:
            return f"{len(kept.index)} of {parameter.shape[kept.axis]} on axis {kept.axis}"
        if (name := self.names[parameter]) in self.reasons:
            return f"whole: {self.reasons[name]}"
        if parameter not in self._masks:
            return None
        if draw is None:
            return "whole: it is not masked now, or on this device"
        return "whole: " + ("each entry is decided by itself" if sum(map(bool, draw.strides)) > 1 else "it is on")

    def moment(self, parameter: Tensor) -> Hashable:
        """What a gradient that is made now hangs on: equal moments have equal masks."""
        draw = self.draw(parameter)
        return None if draw is None else (self._sampler.draws, _key(draw))

    def of(self, parameter: Tensor) -> Kept | None:
        """What the present mask keeps; None for a gradient that is whole, or zero elsewhere than along one axis."""
        draw = self.draw(parameter)
        if draw is None:
            return None
        if self._number != self._sampler.draws:
            self._number = self._sampler.draws
            self._found.clear()
        key = _key(draw), parameter.shape
        if key not in self._found:
            self._found[key] = _kept(draw, parameter)
        return self._found[key]


def _of_hooks(sampler: MixSampler) -> dict[Place, _Mask]:
    masks = sampler.gradient_masks
    if masks is None:
        return {}
    found: dict[Place, _Mask] = {
        place: _OfHook(masks, sampler, place, hook) for place, hook in masks.hooks.items() if isinstance(hook, Drawn)
    }
    for name, block in masks.blocks.items():
        found |= {place: _OfBlock(masks, sampler, place, name) for place in block.places}
    return found


def _host_knows(parameter: Tensor) -> bool:
    """Whether the host can look at a mask without waiting for the device."""
    return parameter.device.type == "cpu"


def _key(draw: Draw | None) -> Hashable:
    # The seed is written anew for every draw: its address names the mask.
    return None if draw is None else (draw.seed.data_ptr(), *draw[1:])


def _kept(draw: Draw, parameter: Tensor) -> Kept | None:
    axes = [axis for axis, stride in enumerate(draw.strides) if stride]
    if draw.p == 0 or len(axes) > 1 or parameter.numel() == 0:
        return None
    axis = axes[0] if axes else 0
    if draw.p < 1 and not axes:  # one decision for the whole
        off = not decisions(draw, [1] * parameter.dim()).item()
        return Kept(0, torch.empty(0, dtype=torch.int64)) if off else None
    along = Draw(draw.seed, draw.p, (draw.strides[axis],), draw.offset)
    return Kept(axis, kept_indices(along, parameter.shape[axis], fixed_number=not _host_knows(parameter)))
