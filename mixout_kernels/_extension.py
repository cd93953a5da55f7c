"""Loads a compiled extension, ``_C`` (CPU) or ``_cuda``, or says in one sentence why there is none."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch


def _build_command() -> str:
    """In a clone the extension is built beside its sources, where python finds it inside the clone and outside."""
    source = Path(__file__).parents[1]
    if (source / "setup.py").is_file():
        return f"pip install --no-build-isolation --no-deps --editable {source}"
    # --no-binary: the wheel of a package index was compiled against one version of torch, perhaps not this one.
    return "pip install --no-build-isolation --no-deps --force-reinstall --no-binary mixout_kernels mixout_kernels"


@functools.cache
def load(name: str = "_C") -> tuple[ModuleType | None, str]:
    """The extension ``mixout_kernels.<name>`` and an empty string, or None and the reason."""
    full_name = f"{__package__}.{name}"
    spec = importlib.util.find_spec(full_name)
    if spec is None or spec.origin is None:
        needed = "nvcc and a CUDA build of torch" if name == "_cuda" else "a C++ compiler, torch"
        return None, (
            f"mixout_kernels, imported from {Path(__file__).parent}, has no compiled extension {name}. To build it, "
            f"have {needed} and ninja installed, then {_build_command()}"
        )
    # The version is read from the file's bytes first: after an upgrade, importing it may fail with an undefined
    # symbol, or worse, succeed and crash later.
    found = re.search(rb"mixout_kernels built for (\w+) ([^\0]+)\0", Path(spec.origin).read_bytes())
    library, version = (text.decode() for text in found.groups()) if found else ("torch", "unknown")
    if reason := _mismatch(library, version):
        return None, f"the compiled extension {name} of mixout_kernels {reason}. To rebuild it: {_build_command()}"
    try:
        return importlib.import_module(full_name), ""
    except ImportError as error:
        return None, (
            f"the compiled extension {name} of mixout_kernels was built for {library} {version} and does not load with "
            f"torch {torch.__version__} ({error}). To rebuild it: {_build_command()}"
        )


def _mismatch(library: str, version: str) -> str | None:
    """Why an extension built for this version of torch, or of the CUDA toolkit, cannot run beside the present torch."""
    if library == "torch" and version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"was built for torch {version}, you have torch {torch.__version__}"
    if library == "CUDA":
        major, minor = divmod(int(version) // 10, 100)
        built_for = f"was built for CUDA {major}.{minor}"
        if torch.version.cuda is None:
            return f"{built_for}, you have torch {torch.__version__}, a build without CUDA"
        # Within a major version the CUDA runtime is compatible both ways; across, the library has another name.
        if torch.version.cuda.split(".")[0] != str(major):
            return f"{built_for}, you have torch {torch.__version__} with CUDA {torch.version.cuda}"
    return None
