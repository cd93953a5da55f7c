"""The CUDA kernels on the host: builds ``mixout_kernels._cuda_emulated`` for ``MIXOUT_KERNELS_CUDA_EMULATION=1``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from torch.utils.cpp_extension import load

REPOSITORY = Path(__file__).resolve().parents[2]
CUDA_SOURCES = REPOSITORY / "csrc" / "cuda"
NAME = "_cuda_emulated"


def register() -> ModuleType:
    """Builds what has changed, into build/, and makes it importable as a part of the package."""
    build_directory = REPOSITORY / "build" / "emulation"
    build_directory.mkdir(parents=True, exist_ok=True)
    module = load(
        NAME,
        [*map(str, sorted((REPOSITORY / "tests" / "cuda" / "emulated").iterdir())), str(CUDA_SOURCES / "bindings.cpp")],
        # -ffp-contract=off as nvcc's --fmad=false. A switch of fibers is a longjmp to another stack, which glibc's
        # fortified version takes for an error.
        extra_cflags=["-DMIXOUT_HOST_EMULATION", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w"],
        build_directory=str(build_directory),
    )
    sys.modules[f"mixout_kernels.{NAME}"] = module
    return module
