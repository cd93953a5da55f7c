"""Builds the C++ extension where it can, and the pure-Python package where it cannot.

MIXOUT_KERNELS_CPU=auto|0|1   the CPU kernels: auto (default) builds them when torch and a C++ compiler are there;
                              1 makes a build that is impossible an error; 0 leaves them out.
MAX_JOBS                      how many files ninja compiles at once.
"""

import os
import shutil
import sys

from setuptools import setup

SOURCES = ["csrc/bindings.cpp", "csrc/cpu/kernels.cpp", "csrc/cpu/mixout.cpp", "csrc/cpu/mix_linear.cpp"]


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
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("g++")):
        return f"no C++ compiler: {compiler} is not on PATH"
    if not shutil.which("ninja"):
        return "ninja is not on PATH; pip install ninja"
    return None


def extension_arguments() -> dict:
    wanted = setting("MIXOUT_KERNELS_CPU")
    if wanted == "0":
        return {}
    missing = what_is_missing()
    if missing and wanted == "1":
        sys.exit(f"MIXOUT_KERNELS_CPU=1, but the CPU kernels cannot be built: {missing}")
    if missing:
        print(f"mixout_kernels: installing without compiled kernels ({missing})", file=sys.stderr)
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # -ffp-contract=off: results equal the plain PyTorch formula bit for bit, on CPUs with and without FMA.
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]
    # at::parallel_for is a template: without OpenMP in this compilation it runs on one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    extension = CppExtension("mixout_kernels._C", SOURCES, extra_compile_args=flags + openmp, extra_link_args=openmp)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
