"""A stand-in for the CUDA runtime, cuBLAS and the driver, beside which a CUDA build of torch runs without a GPU.

    python -m tools.stand_in [--launch-us 2] [--memory-gib 80] COMMAND ...

Preloaded, it takes the place of the functions that torch calls. torch's own code on the host really runs, and so do its
caching allocator, autograd and this package: how long the host needs for a step, what is launched and how much memory
is asked for are those of a GPU machine with such a host. Launches are counted, take the time that is asked for, and
compute nothing.

What it cannot show:

- anything that a GPU does: neither values (they are whatever lies in memory) nor the time of any kernel;
- the host where it waits for a GPU: nothing is ever waited for;
- what the real driver and cuBLAS cost the host beyond one and the same time a launch;
- code compiled at run time: torch.compile, Triton; and cuDNN (torch's own flash attention takes its place).

Functions that are not here are those of the real libraries, which say that there is no driver. It has the layouts of
CUDA 13.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent
COUNTERS = ("kernels", "gemms", "copies", "memsets", "graphs", "synchronisations", "allocations")


def build(folder: Path) -> Path:
    """Compile the stand-in into ``folder`` and return its path; RuntimeError where that is impossible."""
    compiler = (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "").split()
    if not compiler:
        raise RuntimeError("the stand-in for CUDA needs a C compiler: there is neither cc nor gcc on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"  # the name that torch asks the loader for
    flags = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    built = subprocess.run(
        [*compiler, *flags, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(library)], capture_output=True, text=True
    )
    if built.returncode:
        raise RuntimeError(f"the stand-in for CUDA does not compile:\n{built.stderr}")
    return library


def environment(library: Path, launch_us: float, memory_gib: int) -> dict[str, str]:
    """Return the variables under which a process has the stand-in for its GPU."""
    return {
        "LD_PRELOAD": str(library.resolve()),
        "STAND_IN_LAUNCH_NS": str(round(launch_us * 1e3)),
        "STAND_IN_MEMORY_GIB": str(memory_gib),
    }


def launch_us() -> float:
    """Return the microseconds that a launch takes in this process."""
    return int(os.environ["STAND_IN_LAUNCH_NS"]) / 1e3


class StandIn:
    """The counters of a loaded stand-in: without ``library``, of the one that this process runs with."""

    def __init__(self, library: Path | None = None) -> None:
        self.loaded = ctypes.CDLL(str(library) if library else None)
        if not hasattr(self.loaded, "stand_in_counters"):
            raise RuntimeError("this process has no stand-in for CUDA: start it by python -m tools.stand_in COMMAND")
        self.loaded.stand_in_kernel.restype = ctypes.c_char_p

    def counters(self) -> dict[str, int]:
        """Return what was called since the process began."""
        counts = (ctypes.c_int64 * len(COUNTERS))()
        self.loaded.stand_in_counters(counts)
        return dict(zip(COUNTERS, counts, strict=True))

    def kernels(self) -> dict[str, int]:
        """Return how often each kernel was launched since the process began, by the name that nvcc has given it."""
        found: dict[str, int] = {}
        launches = ctypes.c_int64()
        for slot in range(self.loaded.stand_in_kernels()):
            name = self.loaded.stand_in_kernel(slot, ctypes.byref(launches))
            if launches.value:
                text = name.decode() if name else "unknown"
                found[text] = found.get(text, 0) + launches.value
        return found


def difference(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """Return what has come between two answers of a stand-in."""
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
