"""Two kinds of test, for two processes, because Triton decides when it is imported whether it interprets.

TRITON_INTERPRET=1 pytest tests/triton      runs the kernels, on CPU tensors
pytest tests/triton                         compiles them, for GPUs that need not be there
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="TRITON IS NOT INSTALLED: its backend is not tested here")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from . import interpreter

    interpreter.mend()

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="RUN AGAIN WITH TRITON_INTERPRET=1: nothing was executed"
)
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="RUN AGAIN WITHOUT TRITON_INTERPRET: nothing was compiled")
