"""Runs on a GPU where there is one, and otherwise the same kernels in emulation, on CPU tensors."""

from __future__ import annotations

import os

import torch

# The backend reads this when it is imported, which is after this file.
if not torch.cuda.is_available():
    os.environ["MIXOUT_KERNELS_CUDA_EMULATION"] = "1"

from types import ModuleType

import pytest

from . import emulation


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
def _guarded(guarded_memory: None) -> None:
    """Guard the results of every test here."""
