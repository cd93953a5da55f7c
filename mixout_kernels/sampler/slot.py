"""A layer's place in a sampler: what its forward calls in training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from ..backends import MixedWeight
from ..draws import Draw, GradientMask
from ..functional import autocast_enabled, compute_dtype, linear_plan, sampled_linear
from ..gradient_masks import without_gradient
from ..modules import MixedLayer
from ..pieces import is_distributed, local
from . import host_memory
from .backward import EndOfBackward
from .layers import LayerDraw
from .phi import MixedAhead, Phi
from .seeds import Seeds
from .shards import tensor_parallel
from .siblings import SharedInput
from .steps import Steps


class Slot:
    """Calls a layer with the sampler's draw, its Phi made ahead, and what a sibling made of the same input."""

    def __init__(
        self,
        sampler: object,
        phi: Phi,
        ahead: MixedAhead,
        shared: SharedInput,
        seeds: Seeds,
        steps: Steps,
        backward: EndOfBackward,
    ) -> None:
        self.sampler = sampler  # which lives as long as a layer is in it
        self.layer = phi.layer
        self.phi = phi
        self.shared = shared
        self._ahead = ahead
        self._seeds = seeds
        self._steps = steps
        self._backward = backward
        self._last: _LastCall | None = None

    @property
    def draw(self) -> LayerDraw:
        return self.phi.draw

    @property
    def seed(self) -> Tensor:
        """The key of the layer's present mask: an int64 tensor with one element, written anew by every draw."""
        return self.phi.draw.seed

    @property
    def mixed(self) -> Tensor | None:
        """Phi ``[out, in]`` where it is mixed ahead."""
        return self.phi.mixed

    def __call__(self, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        draw = self.phi.draw
        # Compiled and transformed code cannot look at versions and addresses, so it could not tell that a Phi or an
        # x[:, kept] has gone stale; and a replica of nn.DataParallel is on another device than they are. These mix and
        # gather by themselves, with the same seed.
        if is_distributed(weight):
            return self._with_piece(input, weight, bias)
        checks.linear(type(self.layer).__name__, input, weight, bias, autocast_enabled)
        moved = draw.seed.device != weight.device
        alone = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if alone or (moved and weight.device != self.layer.weight.device):
            return self._alone(input, weight, target, bias)
        if moved:
            self._follow(weight.device)
        self._note_forward(weight)
        now = present, gradient = draw.now(weight.shape)
        if self.layer.block is not None and self._seeds.drops(draw.mask, self.layer.grad_p):
            # Nothing is saved, and no gradient is made of zeros.
            operand = None if self.layer.gathered is None else weight.detach()
            target = host_memory.to_device_of(weight, target) if operand is None else None
            phi = MixedWeight(weight.detach(), target, operand, present)
            y, _ = sampled_linear(input, phi, None if bias is None else bias.detach(), gradient)
            return without_gradient(y, weight, bias)
        dtype = compute_dtype(input)
        if self.layer.gathered is None:
            operand = self._ahead.operand(self.phi, dtype, present)
        else:
            operand = weight.detach().to(dtype)
        if self._ahead.host_targets:  # with Phi, or with the weight itself, neither pass needs the target
            needless = operand is not None or present.p == 0
            target = None if needless else host_memory.to_device_of(weight, target)
        if self.layer.gathered is None:
            plan = linear_plan(input, weight, target, present.p, present.strides, gradient)
            self._last = None if plan is None else _LastCall(now, backends.present(), plan)
        phi = MixedWeight(weight, target, operand, present)
        if self.shared.siblings == 1 or input.is_inference():
            return sampled_linear(input, phi, bias, gradient)[0]
        cast, kept = self.shared.made_of(input, dtype, present, gradient.q, self._seeds.draws)
        if cast is None:
            cast = input.to(dtype)
        y, gathered = sampled_linear(cast, phi, bias, gradient, kept_input=kept)
        self._share(input, cast, kept, gathered, now, dtype)
        return y

    def again(
        self, layer: MixedLayer, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """y of a call that is like the last one (:mod:`mixout_kernels.planned`) and finds its Phi ready; else None."""
        if self._last is None or self.layer.block is not None or type(input) is not Tensor:
            return None
        now, kernels, plan = self._last
        if kernels != backends.present() or self.phi.draw.now(weight.shape) is not now:
            return None
        draw, gradient = now
        dtype = plan.compute
        if not self._ahead.is_ready(self.phi, dtype, draw, kernels):
            return None
        operand = self.phi.mixed
        if self._ahead.host_targets:
            if operand is None and draw.p > 0:
                return None
            target = None
        if self.shared.siblings == 1 or input.is_inference():
            found = plan(input, weight, target, bias, operand, None, None, draw.seed)
        else:
            cast, kept = self.shared.made_of(input, dtype, draw, gradient.q, self._seeds.draws)
            found = plan(input, weight, target, bias, operand, cast, kept, draw.seed)
            if found is not None:
                self._share(input, found[2], kept, found[1], now, dtype)
        if found is None:
            return None
        self._note_forward(weight)
        return found[0]

    def _share(
        self, input: Tensor, cast: Tensor, kept: Tensor | None, gathered: Tensor | None, now: Now, dtype: torch.dtype
    ) -> None:
        draw, gradient = now
        if kept is None and gathered is not None and gathered.numel() > 0:
            self.shared.put(input, dtype, cast, gathered, draw, gradient.q, self._seeds.draws)
        self.shared.called_by(self)

    def _note_forward(self, weight: Tensor) -> None:
        self._backward.note_forward()
        if not self._steps.seen and torch.is_grad_enabled() and weight.requires_grad:
            self._steps.note_forward(self.layer)

    def _alone(self, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        draw, gradient = self.phi.draw.fresh(weight.shape, self.seed.to(weight.device))
        target = host_memory.to_device_of(weight, target)
        operand = None if self.layer.gathered is None else weight.detach().to(compute_dtype(input))
        return sampled_linear(input, MixedWeight(weight, target, operand, draw), bias, gradient)[0]

    def _with_piece(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Under tensor parallelism: y of this rank's piece of the weight, as a DTensor."""
        layer = self.layer
        if not torch.compiler.is_compiling():
            self._note_forward(weight)
        draw, gradient = self.phi.draw.fresh(weight.shape, self.seed.to(weight.device))
        gathered = layer.gathered is not None
        target = None if gathered or layer.target is None else local(layer.target)
        return tensor_parallel.linear(input, weight, target, bias, draw, gradient, weight_is_phi=gathered)

    def _follow(self, device: torch.device) -> None:
        self.phi.draw.follow(device)
        self._seeds.keep(phi.draw.seed.device for phi in self._ahead.phis)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer has no sampler: nothing would advance the copy's masks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


Now = tuple[Draw, GradientMask]


class _LastCall(NamedTuple):
    now: Now  # what LayerDraw.now returned: the same object while no setting has changed
    kernels: backends.Choice
    plan: backends.LinearPlan
