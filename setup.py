"""Builds the C++ extension where it can, and the pure-Python package where it cannot.

MIXOUT_KERNELS_CPU=auto|0|1   the CPU kernels: auto (default) builds them when torch and a C++ compiler are there;
                              1 makes a build that is impossible an error; 0 leaves them out.
MIXOUT_KERNELS_CUDA=auto|0|1  the CUDA kernels, likewise; they need nvcc and a CUDA build of torch.
CUDA_HOME                     the CUDA toolkit; see toolkit_folders() for where else one is looked for.
TORCH_CUDA_ARCH_LIST          the GPUs to build for; see cuda_architectures() for what it is when unset.
MAX_JOBS                      how many files ninja compiles at once.
"""

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from setuptools import setup

CUDA_SOURCES = ["csrc/cuda/bindings.cpp", "csrc/cuda/columns.cu", "csrc/cuda/mix.cu", "csrc/cuda/product.cu"]
SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp")), *sorted(glob("csrc/gpu/*.cpp"))]

# The CUDA sources need compute capability 8.0. In TORCH_CUDA_ARCH_LIST the older ones are numbers, or torch's names.
TOO_OLD = re.compile(r"([1-7]\.\d|Kepler|Maxwell|Pascal|Volta|Turing)(\+\w+)?")


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def notice(text: str) -> None:
    print(f"mixout_kernels: {text}", file=sys.stderr)


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

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    toolkit = cuda_toolkit()
    if toolkit is None:
        return (
            "no CUDA toolkit, a folder with bin/nvcc and include/cuda_runtime_api.h, in "
            f"{', '.join(toolkit_folders())}; install the CUDA toolkit {torch.version.cuda}, or point CUDA_HOME at it"
        )
    version = toolkit_version(toolkit)
    versions = f"nvcc is of CUDA {version}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{versions}: the CUDA runtime library is another one in each major version. Point CUDA_HOME at a toolkit "
            f"{torch.version.cuda.split('.')[0]}"
        )
    if not any(map(is_new_enough, cuda_architectures(version))):
        return (
            f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']!r} names no GPU of compute capability 8.0 or "
            "later, which the kernels need; add one, or unset it"
        )
    if version != torch.version.cuda:
        notice(f"warning: {versions}; minor versions go together, as a rule")
    return None


def cuda_toolkit() -> str | None:
    """The first folder with headers, too: the nvcc of one without them is a link, or a script that starts another."""
    for folder in map(Path, toolkit_folders()):
        headers = [folder / "include", *target_headers(folder)]
        if (folder / "bin" / "nvcc").is_file() and any((path / "cuda_runtime_api.h").is_file() for path in headers):
            return str(folder)
    return None


def target_headers(toolkit: Path) -> list[Path]:
    """Where conda's packages have the headers. nvcc knows it, the C++ compiler does not."""
    return sorted(toolkit.glob("targets/*/include"))


def toolkit_folders() -> list[str]:
    """Where a CUDA toolkit may be: as torch guesses, as nvcc says, and where pip puts one."""
    import torch

    folders = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        folders += [os.path.dirname(os.path.dirname(nvcc)), *toolkits_of(os.path.realpath(nvcc))]
    major = torch.version.cuda.split(".")[0]
    folders += [str(Path(torch.__file__).parents[1] / "nvidia" / f"cu{major}"), "/usr/local/cuda"]
    return list(dict.fromkeys(filter(None, folders)))


def toolkits_of(nvcc: str) -> list[str]:
    """A dry run prints the folder of the toolkit as TOP, also through a script that starts another nvcc."""
    dry_run = answer(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    return [os.path.normpath(top) for top in re.findall(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)]


def toolkit_version(toolkit: str) -> str:
    found = re.search(r"release (\d+\.\d+)", answer(os.path.join(toolkit, "bin", "nvcc"), "--version"))
    return found[1] if found else "unknown"


@functools.cache  # nvcc is asked for its folder and its version in several places
def answer(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:  # an nvcc for another machine, say
        return str(error)
    return run.stdout + run.stderr


def cuda_architectures(version: str) -> list[str]:
    """What is wanted: TORCH_CUDA_ARCH_LIST or, where it is unset, what runs on every GPU from 8.0 on.

    Code for 8.0 runs on 8.6 and 8.9 too, code for 10.0 on 10.3, and so on. PTX runs on what comes later: that of 8.0 on
    11.0, which has no code of its own, and that of 12.0 on the GPUs of tomorrow.
    """
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        return named
    knows_blackwell = tuple(map(int, version.split("."))) >= (12, 8)
    return ["8.0+PTX", "9.0", "10.0", "12.0+PTX"] if knows_blackwell else ["8.0", "9.0+PTX"]


def is_new_enough(architecture: str) -> bool:
    return not TOO_OLD.fullmatch(architecture)


def set_for_torch(toolkit: str) -> None:
    """CUDA_HOME, which torch reads when torch.utils.cpp_extension is imported, and TORCH_CUDA_ARCH_LIST."""
    named = os.environ.get("CUDA_HOME")
    if named and named != toolkit:
        notice(f"warning: CUDA_HOME={named} has no bin/nvcc and include/cuda_runtime_api.h; building with {toolkit}")
    os.environ["CUDA_HOME"] = toolkit

    wanted = cuda_architectures(toolkit_version(toolkit))
    if too_old := [name for name in wanted if not is_new_enough(name)]:
        notice(f"warning: leaving out {' '.join(too_old)}: the CUDA kernels need compute capability 8.0 or later")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(filter(is_new_enough, wanted))


def runtime_library(toolkit: str) -> str:
    """pip's packages have no libcudart.so, which -lcudart is for; the linker takes -l:libcudart.so.13 as well."""
    name = min((path.name for path in Path(toolkit, "lib").glob("libcudart.so*")), default="libcudart.so")
    return "cudart" if name == "libcudart.so" else f":{name}"


def cpu_extensions() -> list:
    if not is_to_be_built("MIXOUT_KERNELS_CPU", "CPU kernels", what_is_missing):
        return []

    from torch.utils.cpp_extension import CppExtension

    # -ffp-contract=off: results equal the plain PyTorch formula bit for bit, on CPUs with and without FMA.
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]
    # at::parallel_for is a template: without OpenMP in this compilation it runs on one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    headers = ["csrc/cuda/kernels.h", "csrc/cuda/launchers.h", *glob("csrc/*.h"), *glob("csrc/[cg]pu/*.h")]
    return [
        CppExtension(
            "mixout_kernels._C", SOURCES, depends=headers, extra_compile_args=flags + openmp, extra_link_args=openmp
        )
    ]


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

    toolkit = cuda_toolkit()
    set_for_torch(toolkit)
    from torch.utils.cpp_extension import CUDAExtension

    extension = CUDAExtension(
        "mixout_kernels._cuda",
        CUDA_SOURCES,
        depends=["csrc/mix.h", "csrc/philox.h", *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")],
        # --fmad=false as -ffp-contract=off above; the products ask for their fused multiply-adds by name.
        extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden", "-g0"], "nvcc": ["-O3", "--fmad=false"]},
    )
    # It uses nothing of torch but pybind11's headers, so that it outlives torch upgrades.
    extension.libraries = [runtime_library(toolkit)]
    extension.include_dirs += map(str, target_headers(Path(toolkit)))
    extension.optional = setting("MIXOUT_KERNELS_CUDA") == "auto"
    return [extension]


def is_to_be_built(variable: str, what: str, what_is_missing: Callable[[], str | None]) -> bool:
    wanted = setting(variable)
    missing = what_is_missing() if wanted != "0" else None
    if missing and wanted == "1":
        sys.exit(f"{variable}=1, but the {what} cannot be built: {missing}")
    if missing:
        notice(f"installing without the {what} ({missing})")
    return wanted != "0" and not missing


def digest_header() -> Path:
    """Written for the extensions: of which sources they are, which mixout_kernels/_extension.py asks in a clone.

    In a file of its own the digest has the bindings alone compiled again; in an unchanged one nothing.
    """
    digest = runpy.run_path("mixout_kernels/_extension.py")["digest_of"](Path("csrc"))
    header, text = Path("build", "digest", "digest.h").absolute(), f'#define MIXOUT_DIGEST "{digest}"\n'
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header


@contextmanager
def left_out_if_optional(extension) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not extension.optional:
            raise
        notice(f"installing without {extension.name}, whose build failed: {error}")


def extension_arguments() -> dict:
    cuda = cuda_extensions()  # before torch.utils.cpp_extension is imported: see set_for_torch()
    extensions = [*cpu_extensions(), *cuda]
    if not extensions:
        return {}

    from torch.utils.cpp_extension import BuildExtension

    class BuildEachAlone(BuildExtension):
        def build_extensions(self) -> None:
            """Before it builds any, torch checks whether nvcc goes with the C++ compiler: it sees one at a time."""
            extensions, header = self.extensions, digest_header()
            for extension in extensions:
                extension.include_dirs.append(str(header.parent))
                extension.depends.append(str(header))
                self.extensions = [extension]
                with left_out_if_optional(extension):
                    super().build_extensions()
            self.extensions = extensions

        def build_extension(self, extension) -> None:
            # Here too: setuptools has a message of its own for some of the errors that pass it.
            with left_out_if_optional(extension):
                super().build_extension(extension)

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildEachAlone}}


setup(**extension_arguments())
