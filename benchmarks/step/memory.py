"""Peak memory of training on a CPU: each variant trains a few steps in a fresh process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from .training import Training
from .variants import Variant
from .workload import WORKLOADS

# Gradients and Adam's state exist from the end of the first step on; the second has all at once.
STEPS = 3


def peak_bytes(workload: str, variant: Variant) -> int | None:
    """How far the resident memory rises above what the process had before its model was loaded.

    None where the system does not tell, the process was killed, or the variant compiles code (whose compiler would be
    most of what is measured).
    """
    if sys.platform != "linux" or variant.kind == "compiled":
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_measure, workload, variant).result()
        except BrokenProcessPool:
            return None


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
