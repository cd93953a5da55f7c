"""What happens to targets during training: weights pulled to them, and targets that follow their weights.

Both are post-step hooks of an optimizer, decoupled from its gradient, and work with any ``torch.optim`` optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import checks
from .checkpoints import Pretrained, Source
from .evidence import Evidence, own_patterns
from .modules import MixedLayer, frozen_copy
from .optimizers import step_taken, unwrapped
from .patterns import each_must_match, matches, patterns
from .pieces import is_distributed, local, own_piece


def decay_to_target(
    optimizer: Optimizer,
    model: nn.Module,
    decay: float | Callable[[int], float],
    *,
    exclude: Iterable[str] | None = None,
    missing_keys: Iterable[str] | None = None,
    targets: Source | None = None,
) -> RemovableHandle:
    """Weight decay towards the pretrained weights after every optimizer step: ``w -= lr * decay * (w - u)``.

    This is wdecay(w_pre, lambda) of the Mixout paper (section 5; L2-SP of Li et al., ICML 2018), decoupled as in AdamW;
    set the optimizer's own ``weight_decay`` to 0. It needs no mixout in the model, and goes with it.

    Args:
        optimizer: holds the parameters; lr is that of their group at each step. Wrapped by accelerate or not.
        model: with its pretrained weights. u is the target of a mixout layer where there is one, and a frozen copy of
            the parameter as it is now everywhere else (this costs the bytes of those parameters).
        decay: lambda >= 0, or a function that gives it for the number of steps taken before, from 0 on.
        exclude: patterns of parameters that are not pulled. None leaves out new ones, as
            :func:`mixout_kernels.apply_mixout` does; a list says all, so that ``()`` pulls every parameter.
        missing_keys: as in :func:`mixout_kernels.apply_mixout`.
        targets: where the pretrained parameters are, as in :func:`mixout_kernels.apply_mixout`, for a model that holds
            the weights of a training checkpoint already: without it, biases, norms and embeddings would be pulled to
            those. Parameters that it does not have are not pulled. Targets of mixout layers are theirs all the same.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: for a decay that is negative or not finite, a pattern that matches nothing, or if the optimizer
            holds no parameter of the model that is not excluded.
        TypeError: for a model with mixout under FSDP1, whose pieces of weights belong to no rows of a target, or for an
            optimizer, a model, a decay or ``targets`` of another kind.
        FileNotFoundError: if ``targets`` is a path where there is no checkpoint.
    """
    optimizer = unwrapped("decay_to_target", optimizer)
    checks.module("decay_to_target", model)
    if not callable(decay):
        _check_decay(decay)
    excluded = () if exclude is None else patterns("decay_to_target", "exclude", exclude)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    each_must_match("decay_to_target", "exclude", own_patterns(excluded), names, "parameter")
    evidence = Evidence("decay_to_target", model, missing_keys)
    pretrained = None if targets is None else Pretrained("decay_to_target", targets, model)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    mixed: dict[Tensor, MixedLayer] = {}
    frozen: dict[Tensor, Tensor] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            seen = parameter in mixed or parameter in frozen
            if seen or parameter not in held or any(matches(name, pattern) for pattern in excluded):
                continue
            new = evidence.reason_against(parameter) is not None
            if isinstance(module, MixedLayer) and parameter is module.weight and module.target is not None:
                mixed[parameter] = module
            elif pretrained is not None:
                if (source := pretrained.find(parameter, expected=not new)) is not None:
                    frozen[parameter] = frozen_copy(source).to(local(parameter))
            elif not new or exclude is not None:
                frozen[parameter] = frozen_copy(local(parameter))
    if not mixed and not frozen:
        raise ValueError(
            "decay_to_target: optimizer: expected one that holds pretrained parameters of the model outside "
            f"exclude={tuple(excluded)!r}, got none"
        )
    _check_pieces("decay_to_target", mixed.values())

    def target_of(weight: Tensor) -> Tensor:
        if weight in mixed and (target := mixed[weight].target) is not None:
            return own_piece(target, weight)
        frozen[weight] = frozen[weight].to(weight.device)  # the model may have moved since
        return frozen[weight]

    steps = 0

    @torch.no_grad()
    def pull(optimizer: Optimizer, *_: Any) -> None:
        nonlocal steps
        present = _check_decay(decay(steps)) if callable(decay) else decay
        steps += 1
        for group in optimizer.param_groups:
            weights = [w for w in group["params"] if w.requires_grad and (w in mixed or w in frozen)]
            ends = [target_of(weight) for weight in weights]
            _lerp([local(weight) for weight in weights], ends, group["lr"] * present * step_taken(optimizer))

    return optimizer.register_step_post_hook(pull)


def _check_decay(decay: Any) -> float:
    expected = "a finite number >= 0, or a function that gives one"
    checks.at_least_zero("decay_to_target", "decay", decay, expected)
    return decay


def track_targets(optimizer: Optimizer, model: nn.Module, decay: float) -> RemovableHandle:
    """Targets that follow their weights after every optimizer step: ``u = decay * u + (1 - decay) * w``.

    The anchor of GMixout (arXiv 2510.06982), an exponential moving average. Create it before a ``MixSampler``'s first
    forward or after, in any order: the sampler mixes after the optimizer's own hooks.

    A checkpoint of the model does not hold the moved targets: save :func:`mixout_kernels.targets_state_dict` with it,
    and give that to ``apply_mixout(targets=...)`` in the resumed run.

    Args:
        optimizer: whose steps are counted. Wrapped by accelerate or not.
        model: with mixout layers that have a target.
        decay: in [0, 1]; 1 leaves the targets alone.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: for a decay outside [0, 1], or a model without targets.
        TypeError: for targets that are whole while their weights are sharded: make the MixSampler, or call
            :func:`mixout_kernels.shard_targets`, before. For an optimizer, a model or a decay of another kind.
    """
    optimizer = unwrapped("track_targets", optimizer)
    checks.module("track_targets", model)
    checks.probability("track_targets", "decay", decay)
    layers = [m for m in model.modules() if isinstance(m, MixedLayer) and m.target is not None]
    if not layers:
        raise ValueError("track_targets: model: expected one with mixout layers that have a target, got none")
    _check_pieces("track_targets", layers, whole=False)

    @torch.no_grad()
    def follow(optimizer: Optimizer, *_: Any) -> None:
        # Looked up at every step, since a model may move; by target, since tied weights share one, which moves once.
        weights = {layer.target: layer for layer in layers if layer.target is not None}
        ends = [local(_stepped(layer)) for layer in weights.values()]
        _lerp([local(target) for target in weights], ends, (1 - decay) * step_taken(optimizer))

    return optimizer.register_step_post_hook(follow)


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


def _check_pieces(name: str, layers: Iterable[MixedLayer], *, whole: bool = True) -> None:
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


def _lerp(tensors: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
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
