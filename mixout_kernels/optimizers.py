"""The ``torch.optim`` optimizer that takes the steps, and what a step of it was: training, or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def unwrapped(function: str, optimizer: Any) -> Optimizer:
    """The optimizer whose step calls hooks, from within wrappers such as accelerate's.

    accelerate's is a subclass of Optimizer that never ran its ``__init__``, so that it has no hooks of its own. It is
    the inner one, too, to which GradScaler says that it skips a step. An optimizer around another (Lookahead, SAM) that
    does have hooks takes steps of its own, and is itself.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"{function}: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner


def step_taken(optimizer: Optimizer) -> int | Tensor:
    """1; 0 for a step that only filled the optimizer's state; on the device 0 or 1 where GradScaler decides there.

    GradScaler calls step() of a fused optimizer also when it skips it, and says so by a tensor. And
    ``torch.distributed.checkpoint``'s ``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` take a step with
    zeros for gradients and lr 0, so that the optimizer has a state to describe (pytorch #164929). A step of training
    with lr 0, as the first of a warm-up, has gradients.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        return (found_inf == 0).to(torch.int64)  # counted once for each device that found one
    return 0 if _learning_rates_are_zero(optimizer) and not _any_gradient(optimizer) else 1


def _learning_rates_are_zero(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:
        lr = group.get("lr")
        # One on a GPU would have to be waited for. torch.distributed.checkpoint puts its zero on the CPU.
        if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    return True


def _any_gradient(optimizer: Optimizer) -> bool:
    """Whether a gradient has an element other than zero. Read from the device, but only where every lr is 0."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and bool(getattr(gradient, "_local_tensor", gradient).any()):
                return True
    return False
