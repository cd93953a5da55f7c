"""Memory for what lives no longer than one communication."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """On a CPU kept from call to call, for pages that are new cost more than what is written on them.

    A GPU's memory is kept by torch's allocator, which also knows of streams.
    """

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def room(self, start: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``size`` numbers, any ones, that nobody else has who asked for another range."""
        if device.type != "cpu":
            return torch.empty(size, dtype=dtype, device=device)
        memory = self._memory.get(dtype)
        if memory is None or len(memory) < start + size:
            with torch.inference_mode(False):
                memory = self._memory[dtype] = torch.empty(start + size, dtype=dtype)
        return memory[start : start + size]
