"""What a step of a ``torch.optim`` optimizer was: training, or not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


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
