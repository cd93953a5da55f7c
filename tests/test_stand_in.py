"""The stand-in for CUDA: built by a C compiler alone, and asked by ctypes, as torch would call it.

In processes of their own: a libcuda.so.1 that has been loaded here would be found by whoever looks for a driver later.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import stand_in

from .conftest import ROOT

HEADERS = [Path(folder) for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
CUDA_13_HEADER = next((home / "include" for home in HEADERS if (home / "include/cuda_runtime_api.h").exists()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("NO C COMPILER: the stand-in for CUDA is not tested here")
    return stand_in.build(tmp_path_factory.mktemp("stand-in"))


def run(library, job, launch_us=0.0, memory_gib=80):
    """What ``job(stand_in, functions)`` returns in a process beside the stand-in."""
    code = (
        f"import json; from {__name__} import {job.__name__} as job; from tools.stand_in import StandIn; "
        "found = StandIn(); print(json.dumps(job(found, found.loaded)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **stand_in.environment(library, launch_us, memory_gib)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


def launch(cuda, function, times=1):
    cuda.cudaLaunchKernel.argtypes = [ctypes.c_void_p, Dim3, Dim3, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for _ in range(times):
        assert cuda.cudaLaunchKernel(function, Dim3(1, 1, 1), Dim3(256, 1, 1), None, 0, None) == 0


def one_of_each(found, cuda):
    before = found.counters()
    launch(cuda, 4096, times=3)
    assert cuda.cublasGemmEx() == cuda.cublasLtMatmul() == 0
    memory = ctypes.c_void_p()
    assert cuda.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(16)) == 0
    assert cuda.cudaMemset(memory, 7, ctypes.c_size_t(16)) == 0
    host = ctypes.create_string_buffer(16)
    assert cuda.cudaMemcpy(host, memory, ctypes.c_size_t(16), 2) == 0
    assert cuda.cudaDeviceSynchronize() == 0
    stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cudaGraphLaunch(graph, stream) == 0
    assert cuda.cudaFree(memory) == 0
    return stand_in.difference(found.counters(), before), host.raw.hex()


def test_what_is_called_is_counted_and_small_copies_are_carried_out(library):
    counted, host = run(library, one_of_each)
    assert counted == {
        "kernels": 3,
        "gemms": 2,
        "copies": 1,
        "memsets": 1,
        "graphs": 1,
        "synchronisations": 1,
        "allocations": 1,
    }
    assert host == "07" * 16


def registered_kernels(found, cuda):
    cuda.__getattr__("__cudaRegisterFunction")(None, ctypes.c_void_p(4096), None, b"first", *[None] * 6)
    cuda.__getattr__("__cudaRegisterFunction")(None, ctypes.c_void_p(8192), None, b"second", *[None] * 6)
    launch(cuda, 4096, times=2)
    launch(cuda, 8192)
    launch(cuda, 12288)
    return found.kernels()


def test_kernels_are_counted_by_the_name_that_they_were_registered_with(library):
    assert run(library, registered_kernels) == {"first": 2, "second": 1, "unknown": 1}


def seconds_of_100_launches(found, cuda):
    start = time.perf_counter()
    launch(cuda, 4096, times=100)
    return time.perf_counter() - start


def test_a_launch_takes_the_time_that_was_asked_for(library):
    assert run(library, seconds_of_100_launches, launch_us=500) >= 100 * 500e-6


def large_allocations(found, cuda):
    """Half of the memory three times, with a write of all of it, and what became resident of it."""
    half, gave = 32 << 30, []
    pointers = [ctypes.c_void_p() for _ in range(3)]
    resident = [int(Path("/proc/self/statm").read_text().split()[1])]
    for pointer in pointers:
        gave.append(cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(half - 4096)))
    cuda.cudaMemset(pointers[0], 1, ctypes.c_size_t(half - 4096))
    cuda.cudaMemcpy(pointers[1], pointers[0], ctypes.c_size_t(half - 4096), 3)
    resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cudaFree(pointers[0])
    cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return gave, free.value, total.value, (resident[1] - resident[0]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is preloaded by Linux's loader")
def test_memory_is_limited_and_hardly_any_of_it_is_the_hosts(library):
    gave, free, total, resident = run(library, large_allocations, memory_gib=64)
    assert gave == [0, 0, 2]  # the third: cudaErrorMemoryAllocation
    assert (free, total) == (32 << 30, 64 << 30)
    assert resident < 8 << 20


def captured_and_replayed(found, cuda):
    stream, graph, status = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    seen = []
    cuda.cudaStreamCreate(ctypes.byref(stream))
    for action in ("none", "begin", "end"):
        if action == "begin":
            cuda.cudaStreamBeginCapture(stream, 0)
        if action == "end":
            cuda.cudaStreamEndCapture(stream, ctypes.byref(graph))
        cuda.cudaStreamIsCapturing(stream, ctypes.byref(status))
        seen.append(status.value)
    return seen, graph.value is not None


def test_a_capture_is_seen_where_it_goes_on(library):
    assert run(library, captured_and_replayed) == [[0, 1, 0], True]


def refused(found, cuda):
    return cuda.cuModuleLoadData(None, None)


def test_code_of_the_moment_is_refused(library):
    assert run(library, refused) == 801  # CUDA_ERROR_NOT_SUPPORTED


@pytest.mark.skipif(CUDA_13_HEADER is None, reason="CUDA's headers are not here")
def test_the_properties_lie_where_cuda_13_has_them(library, tmp_path):
    struct = (stand_in.SOURCES / "device.h").read_text().partition("struct {")[2].partition("}")[0]
    fields = [name for name in re.findall(r"(\w+)(?:\[\d+\])?[,;]", struct) if name != "texturesAndSurfaces"]
    assert len(fields) > 50
    checks = [
        f'_Static_assert(offsetof(DeviceProperties, {name}) == offsetof(struct cudaDeviceProp, {name}), "{name}");'
        for name in fields
    ]
    (tmp_path / "check.c").write_text(
        "\n".join(
            [
                "#include <cuda_runtime_api.h>",
                f'#include "{stand_in.SOURCES / "device.h"}"',
                "#if CUDART_VERSION / 1000 == 13",
                '_Static_assert(sizeof(struct cudaDeviceProp) == kWholeProperties, "size");',
                *checks,
                "#endif",
                "",
            ]
        )
    )
    compiler = (os.environ.get("CC") or "cc").split()
    done = subprocess.run(
        [*compiler, "-fsyntax-only", f"-I{CUDA_13_HEADER}", str(tmp_path / "check.c")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_command_runs_beside_it(library):
    code = "from tools.stand_in import StandIn, launch_us; print(sum(StandIn().counters().values()), launch_us())"
    command = [sys.executable, "-m", "tools.stand_in", "--launch-us", "3.5", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "3.5"]


def test_without_it_one_is_told_so():
    with pytest.raises(RuntimeError, match=r"has no stand-in for CUDA: start it by python -m tools\.stand_in COMMAND"):
        stand_in.StandIn()


def test_no_c_compiler_is_one_sentence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.stand_in", "true"],
        cwd=ROOT,
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: the stand-in for CUDA needs a C compiler: there is neither cc nor gcc on PATH\n"
