"""Calls of a layer that are like its last one, past everything that was decided and checked for that.

What a call means hangs on the layer's settings, on the ``kernels`` context, on shapes and dtypes, autocast, and on what
traces or transforms operators. The first two are compared here; the rest, of the tensors that come, is looked at by the
plan, in C++ (``backends.LinearPlan``). Where anything is different the call goes the long way, by ``functional``, whose
checks say what is wrong with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from . import backends
from .draws import GradientMask, Mask, strides_of
from .functional import linear_plan


class Settings(Protocol):
    """A mixed layer's."""

    p: float
    grad_p: float
    rescale: bool
    mask: Mask


class LastCall:
    """What the last call of a layer without a sampler was, if its backend has plans."""

    def __init__(self, layer: Settings, input: Tensor, weight: Tensor, target: Tensor | None) -> None:
        self._settings = _settings(layer)
        gradient = GradientMask.of(layer.p, layer.grad_p, rescale=layer.rescale)
        strides = strides_of(layer.mask, weight.shape)
        self._plan = linear_plan(input, weight, target, layer.p, strides, gradient)

    def again(
        self, layer: Settings, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """y with a fresh mask; None where this is another kind of call."""
        if self._plan is None or self._settings != _settings(layer):
            return None
        found = self._plan(input, weight, target, bias, None, None, None, None)
        return found and found[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer has not been called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Settings(NamedTuple):
    p: float
    grad_p: float
    rescale: bool
    mask: Mask
    kernels: backends.Choice


def _settings(layer: Settings) -> _Settings:
    return _Settings(layer.p, layer.grad_p, layer.rescale, layer.mask, backends.present())
