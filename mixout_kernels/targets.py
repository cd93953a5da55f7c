"""What becomes of targets in training: they follow their weights, and are saved.

Here is also what this shares with the pull of weights to their targets (``decay.py``). Both are hooks of an optimizer,
decoupled from its gradient, and work with any ``torch.optim`` optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import checks
from .modules import MixedLayer
from .optimizers import step_taken, unwrapped
from .pieces import is_distributed, local


def track_targets(optimizer: Optimizer, model: nn.Module, decay: float) -> RemovableHandle:
    """Targets that follow their weights after every optimizer step: ``u = decay * u + (1 - decay) * w``.

    The anchor of GMixout (arXiv 2510.06982), an exponential moving average. Of targets narrower than float32 it is kept
    in float32, four bytes an element from the first step on, and rounded into the target after each step: in bfloat16
    itself, at a usual decay, a step is less than half a unit in the last place and moves nothing.

    Create it before a ``MixSampler``'s first forward or after, in any order: the sampler mixes after the optimizer's
    own hooks.

    A checkpoint of the model does not hold the moved targets: save :func:`mixout_kernels.targets_state_dict` with it,
    and give that to ``apply_mixout(targets=...)`` in the resumed run, whose averages begin with those, rounded as they
    are.

    Args:
        optimizer: whose steps are counted. Wrapped by accelerate or not.
        model: with mixout layers that have a target.
        decay: in [0, 1]; 1 leaves the targets alone.

    Returns:
        A handle; ``handle.remove()`` ends it. So does :func:`mixout_kernels.remove_mixout`, for want of targets.

    Raises:
        ValueError: for a decay outside [0, 1], or a model without targets.
        TypeError: for targets that are whole while their weights are sharded: make the MixSampler, or call
            :func:`mixout_kernels.shard_targets`, before the first step. For an
            optimizer, a model or a decay of another kind.
    """
    optimizer = unwrapped("track_targets", optimizer)
    checks.module("track_targets", model)
    checks.probability("track_targets", "decay", decay)
    layers = [m for m in model.modules() if isinstance(m, MixedLayer) and m.target is not None]
    if not layers:
        raise ValueError("track_targets: model: expected one with mixout layers that have a target, got none")
    check_pieces("track_targets", layers, whole=False)

    averages = _Averages()

    @torch.no_grad()
    def follow(optimizer: Optimizer, *_: Any) -> None:
        # Looked up at every step, since a model may move; by target, since tied weights share one, which moves once.
        # remove_mixout makes plain layers of them.
        mixed = [layer for layer in layers if isinstance(layer, MixedLayer)]
        weights = {layer.target: layer for layer in mixed if layer.target is not None}
        check_pieces("track_targets", weights.values(), whole=False)
        ends = [local(_stepped(layer)) for layer in weights.values()]
        averages.let_go_of_others(weights.values())
        rounds = 0 < decay < 1  # else the result is the target, or the weight
        moved = [averages.of(layer, local(target)) if rounds else local(target) for target, layer in weights.items()]
        lerp(moved, ends, (1 - decay) * step_taken(optimizer))
        for (target, layer), average in zip(weights.items(), moved, strict=True):
            averages.write(layer, local(target), average)

    return optimizer.register_step_post_hook(follow)


class _Averages:
    """The running averages in float32 of targets that are narrower; a wider one is its own."""

    def __init__(self) -> None:
        # With each, the target that it was rounded into last, and that one's version.
        self._of: dict[MixedLayer, tuple[Tensor, weakref.ref[Tensor], int]] = {}

    def let_go_of_others(self, layers: Iterable[MixedLayer]) -> None:
        for layer in self._of.keys() - set(layers):
            del self._of[layer]

    def of(self, layer: MixedLayer, target: Tensor) -> Tensor:
        if target.dtype.itemsize >= torch.float32.itemsize:
            self._of.pop(layer, None)
            return target
        if layer in self._of:
            average, last, version = self._of[layer]
            average = average.to(target.device)
            if last() is target and changes_of(target) == version:
                return average
            # Another tensor, or one that was written to: moved with the model as it is, or given by the user.
            if average.shape == target.shape and torch.equal(average.to(target.dtype), target):
                return average
        return target.float()

    def write(self, layer: MixedLayer, target: Tensor, average: Tensor) -> None:
        if average is not target:
            target.copy_(average)
            self._of[layer] = average, weakref.ref(target), changes_of(target)


def targets_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The targets of a model's mixed layers, by the names of their weights: what ``apply_mixout(targets=...)`` takes.

    The tensors are the targets themselves, as those of ``state_dict()`` are the parameters.

    Raises:
        ValueError: if no layer of the model has a target.
    """
    targets = {
        f"{name}.weight".lstrip("."): module.target
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MixedLayer) and module.target is not None
    }
    if not targets:
        raise ValueError("targets_state_dict: model: expected one with mixout layers that have a target, got none")
    return targets


def _stepped(layer: MixedLayer) -> Tensor:
    """The Parameter that an optimizer holds, also while FSDP has put Phi in its place."""
    return layer.weight if layer.gathered is None else layer.gathered.weight


def changes_of(tensor: Tensor) -> int:
    """Counts the changes in place; those through ``.data`` excepted."""
    piece = local(tensor)
    return 0 if piece.is_inference() else piece._version


def check_pieces(name: str, layers: Iterable[MixedLayer], *, whole: bool = True) -> None:
    """``whole``: whether a whole target will do for a weight of which this rank has a piece."""
    for layer in layers:
        weight, target = _stepped(layer), layer.target
        if target is None or (type(weight) in (Tensor, nn.Parameter) and weight.shape == target.shape):
            continue
        if is_distributed(weight) and (whole or is_distributed(target)):
            continue
        raise TypeError(
            f"{name}: model: expected a weight and a target that are both whole, or both sharded, got a "
            f"{type(weight).__name__} {list(weight.shape)} with a target {list(target.shape)}"
        )


def lerp(tensors: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
    """``t += weight * (end - t)`` in place.

    All at once and without temporaries where dtypes and devices agree; else one by one, so that of targets in host
    memory, or in another dtype, a single copy exists at a time.
    """
    alone = list(zip(tensors, ends, strict=True))
    if isinstance(weight, float):
        alike = [(t, end) for t, end in alone if (t.dtype, t.device) == (end.dtype, end.device)]
        alone = [(t, end) for t, end in alone if (t.dtype, t.device) != (end.dtype, end.device)]
        if alike:
            torch._foreach_lerp_([t for t, _ in alike], [end for _, end in alike], weight)
    for tensor, end in alone:
        # A float goes along as an argument of the kernel; as a tensor it would have to be copied to the GPU each time.
        amount = weight.to(tensor) if isinstance(weight, Tensor) else weight
        tensor.lerp_(end.to(tensor), amount)
