"""Two kinds of test, for two processes, because Triton decides when it is imported whether it interprets.

TRITON_INTERPRET=1 pytest tests/triton      runs the kernels, on CPU tensors
pytest tests/triton                         compiles them, for GPUs that need not be there
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="TRITON IS NOT INSTALLED: its backend is not tested here")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from . import interpreter

    interpreter.mend()

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="RUN AGAIN WITH TRITON_INTERPRET=1: nothing was executed"
)
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="RUN AGAIN WITHOUT TRITON_INTERPRET: nothing was compiled")

_GUARD = 512
_SENTINEL = 61.0


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that the backend allocates holds NaN, between zones that nobody may write to."""
    zones: list[Tensor] = []
    originals = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def guarded(result: Tensor) -> Tensor:
        if not result.is_floating_point() or result.numel() == 0:
            return result
        memory = originals[0](result.numel() + 2 * _GUARD, dtype=result.dtype, device=result.device).fill_(_SENTINEL)
        memory[_GUARD:-_GUARD] = torch.nan
        zones.extend((memory[:_GUARD], memory[-_GUARD:]))
        return memory.as_strided(result.size(), result.stride(), _GUARD)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: guarded(originals[0](*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: guarded(originals[1](*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: guarded(originals[2](*a, **k)))
    yield
    monkeypatch.undo()
    assert all((zone == _SENTINEL).all() for zone in zones), "a kernel wrote outside of its output"
