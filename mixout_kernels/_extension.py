"""Loads a compiled extension, ``_C`` (CPU) or ``_cuda``, or says in one sentence why there is none."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
SOURCES = ROOT / "csrc"  # in a clone


def digest_of(sources: Path) -> str:
    """Of the names and the contents of all C++ and CUDA files. setup.py compiles it into what it builds of them."""
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
            digest.update(b"%s\0%s\0" % (path.relative_to(sources).as_posix().encode(), path.read_bytes()))
    return digest.hexdigest()[:16]


def _is_a_clone() -> bool:
    return (ROOT / "setup.py").is_file()


def _build_command() -> str:
    """In a clone the extension is built beside its sources, where python finds it inside the clone and outside."""
    if _is_a_clone():
        return f"pip install --no-build-isolation --no-deps --editable {ROOT}"
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
            f"mixout_kernels, imported from {PACKAGE}, has no compiled extension {name}. To build it, "
            f"have {needed} and ninja installed, then {_build_command()}"
        )
    # The version is read from the file's bytes first: after an upgrade, importing it may fail with an undefined
    # symbol, or worse, succeed and crash later.
    origin = Path(spec.origin)
    binary = origin.read_bytes()
    found = re.search(rb"mixout_kernels built for (\w+) ([^\0]+)\0", binary)
    library, version = (text.decode() for text in found.groups()) if found else ("torch", "unknown")
    if reason := _mismatch(library, version) or _is_behind(origin, binary):
        return None, f"the compiled extension {name} of mixout_kernels {reason}. To rebuild it: {_build_command()}"
    try:
        return importlib.import_module(full_name), ""
    except ImportError as error:
        return None, (
            f"the compiled extension {name} of mixout_kernels was built for {library} {version} and does not load with "
            f"torch {torch.__version__} ({error}). To rebuild it: {_build_command()}"
        )


def _is_behind(origin: Path, binary: bytes) -> str | None:
    """Why an extension that was built beside its sources cannot be used with them: after a pull they are others."""
    if origin.parent != PACKAGE or not (_is_a_clone() and SOURCES.is_dir()):
        return None
    if b"mixout_kernels built from %s\0" % digest_of(SOURCES).encode() in binary:
        return None
    return f"was built from other sources than are now in {SOURCES}"


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
