"""Where a figure was measured."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

import mixout_kernels
from mixout_kernels import backends


def environment() -> dict[str, str | int]:
    missing = backends.load("cpu").unavailable_reason()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mixout_kernels": mixout_kernels.__version__,
        "kernels": "C++ kernels" if missing is None else f"plain reference, because {missing}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
