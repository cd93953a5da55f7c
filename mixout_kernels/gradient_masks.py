"""Masks on gradients that no layer of this package computes, and blocks of a model that train in some steps only.

A model that has them holds one :class:`GradientMasks`. A ``MixSampler`` gives it the keys of its masks; without one
every backward draws anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .draws import Draw, Mask, fresh_seed, strides_of
from .functional import keep_mask, mask_in_place, mixout
from .gradient_memory import holders_of, may_be_overwritten, prepare

_ATTRIBUTE = "_gradient_masks"


class SeedOn(Protocol):
    """Gives the seed of a mask on a device."""

    def __call__(self, device: torch.device, /) -> Tensor: ...


class Seeds(Protocol):
    """The keys of a sampler's masks by number."""

    def at(self, device: torch.device, number: int) -> Tensor: ...

    def drops(self, number: int, p: float) -> bool: ...


class Place(NamedTuple):
    """A Parameter by where it is: a copied or loaded model has another one there."""

    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter | None:
        return self.module._parameters.get(self.attribute)


@dataclass
class Drawn:
    """Masks a gradient by a draw: ``where(keep, g / (1 - p), 0)``, without the factor if not ``rescale``."""

    name: str  # of the mask: the Parameter's, or its block's
    p: float
    mask: Mask
    rescale: bool
    axis: int | None
    seed: SeedOn = fresh_seed

    def __call__(self, gradient: Tensor, in_place: bool) -> Tensor:
        shape = gradient.shape
        if in_place and self.rescale and self.p < 1 and 1 <= gradient.dim() <= 2:
            draw = self.draw(gradient)
            mask_in_place(gradient.view(-1, *shape[-1:]), draw._replace(strides=(0, *draw.strides)[-2:]))
            return gradient
        seed = self.seed(gradient.device)
        if self.rescale or self.p == 1:
            return mixout(gradient, None, p=self.p, mask=self.mask, axis=self.axis, seed=seed)
        keep = keep_mask(seed, p=self.p, shape=shape, mask=self.mask, axis=self.axis)
        strides = strides_of(self.mask, shape, self.axis)
        keep = keep.view([size if stride else 1 for size, stride in zip(shape, strides, strict=True)])
        return _where(keep, gradient, in_place)

    def draw(self, gradient: Tensor) -> Draw:
        """The decisions for a gradient of this shape."""
        return Draw(self.seed(gradient.device), self.p, strides_of(self.mask, gradient.shape, self.axis))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seed": fresh_seed}  # a copy has no sampler: nothing would advance its masks


@dataclass
class Fixed:
    """Masks a gradient by a tensor of bools that is broadcast to it."""

    keep: Tensor

    def __call__(self, gradient: Tensor, in_place: bool) -> Tensor:
        if self.keep.device != gradient.device:
            self.keep = self.keep.to(gradient.device)
        return _where(self.keep, gradient, in_place)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _where(keep: Tensor, gradient: Tensor, in_place: bool) -> Tensor:
    """``where(keep, gradient, 0)``.

    In place as a product of the bits with 0 or 1, which drops a NaN too: torch vectorises it, and not ``where``. 24
    weights of 1536 x 384 took 3.8 against 24 ms (torch 2.13, two Sapphire Rapids cores), a masked copy of them 32.
    """
    if not in_place:
        return torch.where(keep, gradient, 0)
    gradient.view(_BITS[gradient.dtype.itemsize]).mul_(keep)
    return gradient


@dataclass
class Block:
    """Parameters that train together or not at all in a step."""

    p: float
    places: list[Place] = field(default_factory=list)


class GradientMasks:
    """The hooks and the blocks of a model."""

    def __init__(self) -> None:
        self.hooks: dict[Place, Drawn | Fixed] = {}
        self.blocks: dict[str, Block] = {}
        self.sampler: Any = None
        self._seeds: Seeds | None = None
        self._numbers: Mapping[str, int] = {}
        self._handles: dict[Place, tuple[nn.Parameter, RemovableHandle]] = {}
        self._before_forward: RemovableHandle | None = None

    def put_in(self, model: nn.Module) -> None:
        model.__dict__[_ATTRIBUTE] = self
        self._before_forward = model.register_forward_pre_hook(self._check)
        prepare()
        self._attach(model)

    def take_out_of(self, model: nn.Module) -> None:
        for module in model.modules():
            if module.__dict__.get(_ATTRIBUTE) is self:
                del module.__dict__[_ATTRIBUTE]
        if self._before_forward is not None:
            self._before_forward.remove()
        for _, handle in self._handles.values():
            handle.remove()

    def names(self) -> list[str]:
        """Of the masks that a sampler is to draw for it."""
        drawn = [hook.name for hook in self.hooks.values() if isinstance(hook, Drawn)]
        return list(dict.fromkeys([*drawn, *self.blocks]))

    def parameters(self) -> list[nn.Parameter]:
        places = [*self.hooks, *(place for block in self.blocks.values() for place in block.places)]
        return [parameter for place in dict.fromkeys(places) if (parameter := place.parameter) is not None]

    def bind(self, sampler: Any, seeds: Seeds, numbers: Mapping[str, int]) -> None:
        """Draws by a sampler from now on, which lives as long as the masks; ``numbers`` are its masks' by name."""
        self.sampler, self._seeds, self._numbers = sampler, seeds, numbers
        for place, hook in self.hooks.items():
            if isinstance(hook, Drawn):
                hook.seed = _SeedOf(seeds, numbers[hook.name])
                if (parameter := place.parameter) is not None:
                    hook.seed(parameter.device)  # whose steps are counted from now on

    def unbind(self, sampler: Any) -> None:
        if self.sampler is not sampler:
            return
        self.sampler = self._seeds = None
        for hook in self.hooks.values():
            if isinstance(hook, Drawn):
                hook.seed = fresh_seed

    def let_go_of_blocks(self, parameters: Iterable[Tensor]) -> None:
        """Before an optimizer's step: no gradient, not even zeros, for what is to stay still.

        Momentum and weight decay would move it, and DistributedDataParallel makes zeros of gradients that are None.
        """
        if not self.blocks or self._seeds is None:
            return
        held = {id(parameter) for parameter in parameters}
        for name, block in self.blocks.items():
            if self.is_off(name):
                for place in block.places:
                    if (parameter := place.parameter) is not None and id(parameter) in held:
                        parameter.grad = None

    def is_off(self, block: str) -> bool:
        """Whether nothing in this block trains in the present draw of the sampler."""
        return self._seeds is not None and self._seeds.drops(self._numbers[block], self.blocks[block].p)

    def _check(self, model: nn.Module, _: Any) -> None:
        if not model.training or torch.compiler.is_compiling():
            return
        if self.blocks and self._seeds is None:
            raise ValueError(
                "apply_graddrop: mask: expected a MixSampler of the model in training with 'layer', got none: layer "
                "masks are drawn once a step; make one with MixSampler(model)"
            )
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        """Hooks are on tensors, which a copy of the model, or a load that assigns, replaces."""
        replaced: dict[Place, nn.Parameter] = {}
        for place in self.hooks:
            parameter, known = place.parameter, self._handles.get(place)
            if parameter is not None and (known is None or known[0] is not parameter):
                replaced[place] = parameter
        if replaced:
            _refuse_fsdp2(model, next(iter(replaced)))
        for place, parameter in replaced.items():
            if place in self._handles:
                self._handles[place][1].remove()
            if parameter.requires_grad:
                hook = _InTraining(place.module, self.hooks[place])
                self._handles[place] = parameter, parameter.register_hook(hook)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has Parameters of its own, and no sampler.
        return self.__dict__ | {"sampler": None, "_seeds": None, "_numbers": {}, "_handles": {}}


def _refuse_fsdp2(model: nn.Module, place: Place) -> None:
    if any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__):
        raise RuntimeError(
            f"apply_graddrop: model: expected one without FSDP2 where a hook masks a gradient, as that of "
            f"{place.attribute!r} of a {type(place.module).__name__}: FSDP2 calls no hooks of Parameters; mask the "
            "weights of linear layers alone (include=, exclude=)"
        )


class _InTraining(NamedTuple):
    """A hook on a Parameter. In evaluation its gradient stays whole, as that of a mixed layer does."""

    module: nn.Module
    mask: Drawn | Fixed

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or not self.module.training:  # None: of a layer in a block that is off
            return gradient
        holders = holders_of(gradient)
        return self.mask(gradient, may_be_overwritten(gradient, holders))


class _SeedOf(NamedTuple):
    seeds: Seeds
    number: int

    def __call__(self, device: torch.device) -> Tensor:
        return self.seeds.at(device, self.number)


def gradient_masks_of(model: nn.Module) -> GradientMasks | None:
    """Those of the model, or of one within it (under DDP, say)."""
    return next((m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__), None)


class _Connect(torch.autograd.Function):
    """y as it is, with parameters that have a place in the graph and no gradient: DDP waits for each of them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.number = len(parameters)
        return torch.ops.aten._unsafe_view(y, y.shape)  # autograd forbids in-place operations on a Function's view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.number


def without_gradient(y: Tensor, *parameters: Tensor | None) -> Tensor:
    """y, made of these parameters detached."""
    return _Connect.apply(y, *(parameter for parameter in parameters if parameter is not None))
