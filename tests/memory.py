"""Memory that shows what a kernel forgets to write, writes beside its result, or should not have read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mixout_kernels import reference
from mixout_kernels.draws import Draw, strides_of

_GUARD_BYTES = 256  # keeps the alignment that fresh memory has
_POISON = 0xFF  # NaN in every floating-point dtype


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so an element that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that Python code allocates for results holds NaN, and lies between zones that nobody may write to."""
    buffers: list[Tensor] = []

    def guarded(result: Tensor) -> Tensor:
        if result.numel() == 0:
            return result
        extent = 1 + sum((size - 1) * stride for size, stride in zip(result.shape, result.stride(), strict=True))
        bytes_ = extent * result.element_size()
        buffer = torch.full((bytes_ + 2 * _GUARD_BYTES,), _POISON, dtype=torch.uint8, device=result.device)
        buffers.append(buffer)
        inner = buffer[_GUARD_BYTES : _GUARD_BYTES + bytes_].view(result.dtype)
        return inner.as_strided(result.shape, result.stride())

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _original=original, **k: guarded(_original(*a, **k)))
    yield
    monkeypatch.undo()
    for buffer in buffers:
        for zone in (buffer[:_GUARD_BYTES], buffer[-_GUARD_BYTES:]):
            assert bool((zone == _POISON).all()), "a kernel wrote outside of its result"


def keep_of(weight: Tensor, p: float, mask: str, seed: int | Tensor) -> Tensor:
    """The reference's decision for every entry of this weight."""
    draw = Draw(torch.as_tensor(seed).reshape(1).to(weight.device), p, strides_of(mask, weight.shape))
    return reference.decisions(draw, weight.shape).expand(weight.shape)


def poison_dropped(weight: Tensor, draw: Draw) -> Tensor:
    """Write NaN and Inf, in turn, into what the draw does not keep: none of them may reach a result."""
    even = torch.arange(weight.numel(), device=weight.device).view(weight.shape) % 2 == 0
    poison = torch.where(even, math.nan, math.inf).to(weight.dtype)
    return weight.copy_(torch.where(reference.decisions(draw, weight.shape), weight, poison))
