"""Where, when and with what a figure was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import cpuinfo  # type: ignore[import-untyped]
import torch
from pytest_benchmark.utils import get_commit_info

import mixout_kernels
from mixout_kernels import backends


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Describe this machine and the versions in use, for the head of a report and the columns of a CSV."""
    missing = backends.load("cpu").unavailable_reason()
    commit = get_commit_info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(cpuinfo.get_cpu_info()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "mixout_kernels": mixout_kernels.__version__,
        "kernels": "C++ kernels" if missing is None else f"plain reference, because {missing}",
        "commit": f"{commit.get('id', 'unknown')[:12]}{' with local changes' if commit.get('dirty') else ''}",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }


def _cpu_name(found: Mapping[str, Any]) -> str:
    """The CPU's name. Virtual machines call Zen 4 and Zen 5 alike "AMD EPYC": the model number tells them apart."""
    name = str(found.get("brand_raw", platform.machine()))
    if any(character.isdigit() for character in name) or not {"family", "model"} <= found.keys():
        return name
    return f"{name} (family {found['family']}, model {found['model']})"
