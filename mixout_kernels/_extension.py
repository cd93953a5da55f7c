"""Loads the compiled extension ``mixout_kernels._C``, or says in one sentence why there is none."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps mixout_kernels (from its source folder: .)"


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension and an empty string, or None and the reason."""
    spec = importlib.util.find_spec("mixout_kernels._C")
    if spec is None or spec.origin is None:
        return None, (
            "mixout_kernels was installed without its compiled extension. To build it, have a C++ compiler, torch and "
            f"ninja installed, then {REBUILD}"
        )
    # The version is read from the file's bytes first: after a torch upgrade, importing it may fail with an undefined
    # symbol, or worse, succeed and crash later.
    found = re.search(rb"mixout_kernels built for torch ([^\0]+)\0", Path(spec.origin).read_bytes())
    built_for = found.group(1).decode() if found else "unknown"
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        return None, _mismatch(built_for, "")
    try:
        return importlib.import_module("mixout_kernels._C"), ""
    except ImportError as error:
        return None, _mismatch(built_for, f" ({error})")


def _mismatch(built_for: str, detail: str) -> str:
    return (
        f"the compiled extension of mixout_kernels was built for torch {built_for}, you have torch "
        f"{torch.__version__}{detail}. To rebuild it: {REBUILD}"
    )
