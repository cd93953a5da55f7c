"""Builds the C++ extension where it can, and the pure-Python package where it cannot.

MIXOUT_KERNELS_CPU=auto|0|1   the CPU kernels: auto (default) builds them when torch and a C++ compiler are there;
                              1 makes a build that is impossible an error; 0 leaves them out.
MIXOUT_KERNELS_CUDA=auto|0|1  the CUDA kernels, likewise; they need nvcc and a CUDA build of torch.
TORCH_CUDA_ARCH_LIST          the GPUs to build for; see cuda_architectures() for what it is when unset.
MAX_JOBS                      how many files ninja compiles at once.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from glob import glob

from setuptools import setup

CUDA_SOURCES = ["csrc/cuda/bindings.cpp", "csrc/cuda/columns.cu", "csrc/cuda/mix.cu", "csrc/cuda/product.cu"]
SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def what_is_missing() -> str | None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return "torch is not importable in the build environment; pip install torch, then use --no-build-isolation"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler: {compilers[0]} is not on PATH"
    if not shutil.which("ninja"):
        return "ninja is not on PATH; pip install ninja"
    return None


def what_is_missing_for_cuda() -> str | None:
    if missing := what_is_missing():
        return missing
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    if not os.path.exists(os.path.join(CUDA_HOME or "", "bin", "nvcc")):
        return f"nvcc is not on PATH, nor in CUDA_HOME; install the CUDA toolkit {torch.version.cuda}"
    toolkit = toolkit_version(CUDA_HOME)
    versions = f"nvcc is of CUDA {toolkit}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    if toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{versions}: the CUDA runtime library is another one in each major version. Point CUDA_HOME at a toolkit "
            f"{torch.version.cuda.split('.')[0]}"
        )
    if toolkit != torch.version.cuda:
        print(f"mixout_kernels: warning: {versions}; minor versions go together, as a rule", file=sys.stderr)
    return None


def toolkit_version(cuda_home: str) -> str:
    text = subprocess.run([os.path.join(cuda_home, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def cuda_architectures(toolkit: str) -> str:
    """Code for 8.0 runs on 8.6 and 8.9 too, code for 10.0 on 10.3, and so on; PTX runs on what comes later."""
    knows_blackwell = tuple(map(int, toolkit.split("."))) >= (12, 8)
    return "8.0;9.0;10.0;12.0+PTX" if knows_blackwell else "8.0;9.0+PTX"


def cpu_extensions() -> list:
    if not is_to_be_built("MIXOUT_KERNELS_CPU", "CPU kernels", what_is_missing):
        return []

    from torch.utils.cpp_extension import CppExtension

    # -ffp-contract=off: results equal the plain PyTorch formula bit for bit, on CPUs with and without FMA.
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]
    # at::parallel_for is a template: without OpenMP in this compilation it runs on one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return [CppExtension("mixout_kernels._C", SOURCES, extra_compile_args=flags + openmp, extra_link_args=openmp)]


def torch_has_cuda() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.version.cuda is not None


def cuda_extensions() -> list:
    # Beside a torch without CUDA nobody expects them, and a notice would be noise.
    if setting("MIXOUT_KERNELS_CUDA") == "auto" and not torch_has_cuda():
        return []
    if not is_to_be_built("MIXOUT_KERNELS_CUDA", "CUDA kernels", what_is_missing_for_cuda):
        return []

    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures(toolkit_version(CUDA_HOME)))
    extension = CUDAExtension(
        "mixout_kernels._cuda",
        CUDA_SOURCES,
        depends=["csrc/mix.h", "csrc/philox.h", *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")],
        # --fmad=false as -ffp-contract=off above; the products ask for their fused multiply-adds by name.
        extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden", "-g0"], "nvcc": ["-O3", "--fmad=false"]},
    )
    # It uses nothing of torch but pybind11's headers, so that it outlives torch upgrades.
    extension.libraries = ["cudart"]
    extension.optional = setting("MIXOUT_KERNELS_CUDA") == "auto"
    return [extension]


def is_to_be_built(variable: str, what: str, what_is_missing: Callable[[], str | None]) -> bool:
    wanted = setting(variable)
    missing = what_is_missing() if wanted != "0" else None
    if missing and wanted == "1":
        sys.exit(f"{variable}=1, but the {what} cannot be built: {missing}")
    if missing:
        print(f"mixout_kernels: installing without the {what} ({missing})", file=sys.stderr)
    return wanted != "0" and not missing


def extension_arguments() -> dict:
    extensions = [*cpu_extensions(), *cuda_extensions()]
    if not extensions:
        return {}

    from torch.utils.cpp_extension import BuildExtension

    class BuildEachAlone(BuildExtension):
        def build_extension(self, extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                print(
                    f"mixout_kernels: installing without {extension.name}, whose build failed: {error}", file=sys.stderr
                )

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildEachAlone}}


setup(**extension_arguments())
