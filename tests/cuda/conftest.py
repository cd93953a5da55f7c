"""Runs on a GPU where there is one, and otherwise the same kernels in emulation, on CPU tensors."""

from __future__ import annotations

import os

import torch

# The backend reads this when it is imported, which is after this file.
if not torch.cuda.is_available():
    os.environ["MIXOUT_KERNELS_CUDA_EMULATION"] = "1"

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from . import emulation

GUARD_BYTES = 256  # keeps the alignment that fresh memory has
POISON = 0xFF  # NaN in every floating-point dtype


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("MIXOUT_KERNELS_CUDA_EMULATION") == "1":
        emulation.register()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    from mixout_kernels.backends import cuda

    assert cuda.unavailable_reason() is None
    return cuda


@pytest.fixture(autouse=True)
def same_order_in_every_run() -> None:
    """The emulation's random order of blocks and warps begins anew with each test."""
    if torch.cuda.is_available():
        return
    from mixout_kernels.backends.cuda import primitives

    primitives._loaded.emulate()


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory for results is poisoned, and lies between guard zones that must be untouched after the test."""
    buffers: list[Tensor] = []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        bytes_ = math.prod(shape) * dtype.itemsize
        buffer = torch.full((bytes_ + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8, device=device)
        buffers.append(buffer)
        return buffer[GUARD_BYTES : GUARD_BYTES + bytes_].view(dtype).view(shape)

    def empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        transposed = t.dim() == 2 and not t.is_contiguous() and t.t().is_contiguous()
        memory = empty(t.t().shape if transposed else t.shape, dtype=dtype or t.dtype, device=t.device)
        return memory.t() if transposed else memory

    def new_empty(t: Tensor, *shape: Any) -> Tensor:
        return empty(*shape, dtype=t.dtype, device=t.device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        guards = torch.cat([buffer[:GUARD_BYTES], buffer[len(buffer) - GUARD_BYTES :]])
        assert bool((guards == POISON).all()), "a kernel wrote outside its result"
