"""The axes that the suite is parametrised over, each in one place: ``@axes.masks``, ``@axes.dtypes``.

A new kind of mask is in ``draws.KINDS``, and thereby in every test of masks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixout_kernels.draws import KINDS

MASKS = tuple(KINDS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPU_DTYPES = DTYPES[1:]  # those that GPU kernels are for
HALF = DTYPES[2:]
SCHEDULES = ("fused", "staged")

masks = pytest.mark.parametrize("mask", MASKS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gpu_dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
wide_and_narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
half = pytest.mark.parametrize("compute", HALF, ids=str)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
targets = pytest.mark.parametrize("target", [True, None], ids=["target", "zero"])
transposed = pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a normal tensor of this shape, drawn in float64; a matrix also "transposed" or "strided" in memory."""
    memory = {"transposed": shape[::-1], "strided": (*shape[:-1], 2 * shape[-1])}.get(layout, shape)
    drawn = torch.randn(memory, dtype=torch.float64, generator=generator).to(device, dtype)
    return {"transposed": drawn.t, "strided": lambda: drawn[..., ::2]}.get(layout, lambda: drawn)()
