"""Hooks of every ``torch.optim`` optimizer's step, for all samplers that live."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Follower(Protocol):
    def before_step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """``parameters`` are all that the optimizer holds."""

    def after_step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None: ...


# One pair of hooks for all followers, which stays: torch iterates over its dict of hooks, and one that the garbage
# collector took away at that moment, with its sampler, was an error in the optimizer's step.
followers: weakref.WeakSet[Follower] = weakref.WeakSet()


def follow(follower: Follower) -> None:
    _register()
    followers.add(follower)


@functools.cache
def _register() -> None:
    # Not traced into a compiled optimizer step, where neither addresses nor versions can be looked at.
    register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if present := list(followers):
        parameters = _parameters(optimizer)
        for follower in present:
            follower.before_step(optimizer, parameters)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if present := list(followers):
        parameters = _parameters(optimizer)
        for follower in present:
            follower.after_step(optimizer, parameters)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
