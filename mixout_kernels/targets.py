"""What happens to targets during training: weights pulled to them, and targets that follow their weights.

Both are post-step hooks of an optimizer, decoupled from its gradient, and work with any ``torch.optim`` optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .convert import DEFAULT_HEADS, matches, patterns
from .modules import MixConv1D, MixLinear, frozen_copy


def decay_to_target(
    optimizer: Optimizer, model: nn.Module, decay: float, *, exclude: Iterable[str] = DEFAULT_HEADS
) -> RemovableHandle:
    """Weight decay towards the pretrained weights after every optimizer step: ``w -= lr * decay * (w - u)``.

    This is wdecay(w_pre, lambda) of the Mixout paper (section 5; L2-SP of Li et al., ICML 2018), decoupled as in AdamW;
    set the optimizer's own ``weight_decay`` to 0. It needs no mixout in the model, and goes with it.

    Args:
        optimizer: holds the parameters; lr is that of their group at each step.
        model: with its pretrained weights. u is the target of a mixout layer where there is one, and a frozen copy of
            the parameter as it is now everywhere else (this costs the bytes of those parameters).
        decay: lambda >= 0.
        exclude: patterns as in :func:`mixout_kernels.apply_mixout`; by default new heads, which have no pretrained
            weight to go back to. ``()`` includes them.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: for a negative decay, or if the optimizer holds no parameter of the model that is not excluded.
    """
    if not decay >= 0:
        raise ValueError(f"decay_to_target: decay: expected a number >= 0, got {decay!r}")
    excluded = patterns("exclude", exclude)
    targets: dict[Tensor, Tensor] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter in targets or any(matches(name, pattern) for pattern in excluded):
                continue
            is_mixed = isinstance(module, (MixLinear, MixConv1D)) and parameter is module.weight
            target = module.target if is_mixed else None
            targets[parameter] = frozen_copy(parameter) if not isinstance(target, Tensor) else target
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    targets = {parameter: target for parameter, target in targets.items() if parameter in held}
    if not targets:
        raise ValueError(
            "decay_to_target: optimizer: expected one that holds parameters of the model outside "
            f"exclude={tuple(excluded)!r}, got none"
        )

    @torch.no_grad()
    def pull(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            weights = [parameter for parameter in group["params"] if parameter in targets and parameter.requires_grad]
            _lerp(weights, [targets[weight] for weight in weights], group["lr"] * decay)

    return optimizer.register_step_post_hook(pull)


def track_targets(optimizer: Optimizer, model: nn.Module, decay: float) -> RemovableHandle:
    """Targets that follow their weights after every optimizer step: ``u = decay * u + (1 - decay) * w``.

    The anchor of GMixout (arXiv 2510.06982), an exponential moving average. Create it before a ``MixSampler``'s first
    forward or after, in any order: the sampler mixes after the optimizer's own hooks.

    Args:
        optimizer: whose steps are counted.
        model: with mixout layers that have a target.
        decay: in [0, 1]; 1 leaves the targets alone.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: for a decay outside [0, 1], or a model without targets.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"track_targets: decay: expected a number in [0, 1], got {decay!r}")
    targets: dict[Tensor, Tensor] = {}  # tied weights share one target, which must move once a step
    for module in model.modules():
        if isinstance(module, (MixLinear, MixConv1D)) and module.target is not None:
            targets[module.target] = module.weight
    if not targets:
        raise ValueError("track_targets: model: expected one with mixout layers that have a target, got none")

    @torch.no_grad()
    def follow(*_: Any) -> None:
        _lerp(list(targets), list(targets.values()), 1 - decay)

    return optimizer.register_step_post_hook(follow)


def _lerp(tensors: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
    """``t += weight * (end - t)`` in place, without temporaries of the tensors' size where dtypes agree."""
    if isinstance(weight, float) and all(t.dtype == end.dtype for t, end in zip(tensors, ends, strict=True)):
        if tensors:
            torch._foreach_lerp_(tensors, ends, weight)
        return
    for tensor, end in zip(tensors, ends, strict=True):
        amount = torch.as_tensor(weight, dtype=tensor.dtype, device=tensor.device)
        tensor.lerp_(end.to(tensor.dtype), amount)
