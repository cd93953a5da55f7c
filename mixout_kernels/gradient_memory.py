"""Whether a hook may write its mask over a gradient instead of making another tensor of the gradient's size.

The gradient of MiniLM's embedding has 47 MB. A masked copy of it in every step is fresh memory, whose page faults fall
on the mask, on AdamW and on the zeros that the next backward fills in: 60 of 195 ms a step (docs/performance.md).
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Holders(NamedTuple):
    """How often a gradient is held while a hook looks at it.

    By Python, by C++, its memory by all tensors, and what it is a view of: the gradient of a linear layer's weight is a
    transposed product.
    """

    python: int
    tensor: int
    storage: int
    base: int | None

    @classmethod
    def of(cls, gradient: Tensor) -> Holders:
        storage = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
        base = None if gradient._base is None else gradient._base._use_count()  # type: ignore[attr-defined]
        return cls(sys.getrefcount(gradient), gradient._use_count(), storage, base)  # type: ignore[attr-defined]


def may_be_overwritten(gradient: Tensor, holders: Holders | None) -> bool:
    """Whether the engine alone holds this gradient, as dense memory of its own on the CPU; ``holders`` as the hook saw.

    Autograd gives one tensor to both terms of a sum, an earlier hook may have kept it, and a graph of the gradients
    (create_graph=True) records what is done to it.
    """
    if holders not in _alone() or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return gradient.device.type == "cpu" and gradient.layout == torch.strided and gradient.is_contiguous()


def holders_of(gradient: Tensor) -> Holders | None:
    """Called by a hook on a Parameter, first of all: each further name for the gradient counts."""
    return Holders.of(gradient) if type(gradient) is Tensor and _can_count() else None


@functools.cache
def _can_count() -> bool:
    return hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")


class _Hook(NamedTuple):
    found: set[Holders | None]

    def __call__(self, gradient: Tensor | None) -> Any:
        if gradient is not None:
            self.found.add(holders_of(gradient))


@functools.cache
def _alone() -> frozenset[Holders | None]:
    """What a hook sees of gradients that nobody else holds, with this torch and this Python: of two that are known."""
    found: set[Holders | None] = set()
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.register_hook(_Hook(found))
    with torch.enable_grad():
        torch.nn.functional.embedding(torch.tensor([1]), weight).sum().backward()
        torch.nn.functional.linear(torch.ones(3, 2), weight).sum().backward()
    return frozenset(found - {None})


def prepare() -> None:
    """Count once, outside of any backward pass."""
    _alone()
