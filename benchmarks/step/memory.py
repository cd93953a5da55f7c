"""Peak memory of training on a CPU: each variant trains a few steps in a fresh process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .training import Training
from .variants import Variant
from .workload import WORKLOADS

# Gradients and Adam's state exist from the end of the first step on; the second has all at once.
STEPS = 3


def peak_bytes(workload: str, variants: Sequence[Variant]) -> dict[Variant, int]:
    """How far the resident memory rises above what the process had before its model was loaded.

    Not of variants that compile code, whose compiler would be most of what is measured, and only where the system
    tells it.
    """
    if sys.platform != "linux":
        return {}
    measured = [variant for variant in variants if variant.mode == "eager"]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as processes:
        return dict(zip(measured, processes.map(_measure, [workload] * len(measured), measured), strict=True))


def _measure(workload: str, variant: Variant) -> int:
    before = _status_bytes("VmRSS")
    training = Training(WORKLOADS[workload], variant)
    for _ in range(STEPS):
        training.step()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise KeyError(name)
