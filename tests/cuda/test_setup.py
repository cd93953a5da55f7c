"""setup.py's CUDA part: whether it builds, for which GPUs, and with which toolkit.

No CUDA build of torch is needed: a stand-in torch plays one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_TORCH = """
__version__ = "2.13.0"
class version:
    cuda = {cuda!r}
"""
FAKE_CPP_EXTENSION = """
import os
import setuptools
CUDA_HOME = os.environ.get("CUDA_HOME")
def CppExtension(name, sources, **_):
    return setuptools.Extension(name, sources)
CUDAExtension = CppExtension
class BuildExtension:
    def build_extensions(self):
        if os.environ["BUILD"] == "check" and any(e.name.endswith("_cuda") for e in self.extensions):
            raise RuntimeError("no such compiler")
        for extension in self.extensions:
            self.build_extension(extension)
    def build_extension(self, extension):
        if extension.name.endswith("_cuda"):
            raise RuntimeError("no such instruction")
        print("built", extension.name)
"""
RUN_SETUP = """
import os, pathlib, runpy, setuptools
def setup(cmdclass=None, ext_modules=()):
    from torch.utils.cpp_extension import CUDA_HOME
    for e in ext_modules:
        print("extension", e.name, e.libraries, e.include_dirs, CUDA_HOME, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    if os.environ.get("BUILD"):
        command = object.__new__(cmdclass["build_ext"])
        command.extensions = ext_modules
        command.build_extensions()
setuptools.setup = setup
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda path: not str(path).startswith("/usr/") and is_file(path)  # no toolkit of this machine
runpy.run_path("setup.py")
"""


def program(path, script=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def make_toolkit(home, version="13.0", headers="include"):
    release = f"echo Cuda compilation tools, release {version}, V{version}.88"
    program(home / "bin" / "nvcc", f'echo "#$ TOP=${{0%/*}}/.." >&2; {release}')  # as nvcc --dryrun, and --version
    (home / headers).mkdir(parents=True)
    (home / headers / "cuda_runtime_api.h").touch()
    return home


def run_setup(folder, *, toolkit="13.0", torch_cuda="13.0", **environment):
    """setup.py beside a torch built with CUDA ``torch_cuda`` (None: without) and nvcc ``toolkit`` (None: no nvcc)."""
    fake = folder / "torch" / "utils"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (folder / "torch" / "__init__.py").write_text(FAKE_TORCH.format(cuda=torch_cuda))
    (fake / "cpp_extension.py").write_text(FAKE_CPP_EXTENSION)
    if toolkit is not None:
        environment.setdefault("CUDA_HOME", str(make_toolkit(folder / "toolkit", toolkit)))
    for tool in ("c++", "ninja"):
        program(folder / "tools" / tool)
    return subprocess.run(
        [sys.executable, "-c", RUN_SETUP],
        cwd=ROOT,
        env={"PATH": f"{folder}/tools", "PYTHONPATH": str(folder), "MIXOUT_KERNELS_CPU": "0", **environment},
        capture_output=True,
        text=True,
    )


def test_cuda_is_built_where_it_can_be(tmp_path):
    run = run_setup(tmp_path)
    home = tmp_path / "toolkit"
    assert run.stdout == f"extension mixout_kernels._cuda ['cudart'] [] {home} 8.0+PTX;9.0;10.0;12.0+PTX\n"
    assert (run.returncode, run.stderr) == (0, "")


# --- which toolkit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["the toolkit's own", "a link", "a script"])
def test_the_toolkit_of_the_nvcc_on_path(tmp_path, kind):
    """Torch takes the folder above nvcc's, in which only the first of these has the CUDA headers."""
    nvcc = make_toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    on_path = tmp_path / "local" / "bin" / "nvcc"
    if kind == "a script":
        program(on_path, f'exec {nvcc} "$@"')
    elif kind == "a link":
        on_path.parent.mkdir(parents=True)
        on_path.symlink_to(nvcc)
    else:
        on_path = nvcc
    # With the CPU kernels: they import torch.utils.cpp_extension too, which reads CUDA_HOME.
    path = f"{on_path.parent}:{tmp_path / 'tools'}"
    run = run_setup(tmp_path, toolkit=None, PATH=path, MIXOUT_KERNELS_CPU="auto")
    assert f"extension mixout_kernels._cuda ['cudart'] [] {tmp_path / 'cuda'} " in run.stdout
    assert "extension mixout_kernels._C " in run.stdout
    assert (run.returncode, run.stderr) == (0, "")


def test_the_toolkit_of_conda(tmp_path):
    headers = make_toolkit(tmp_path / "conda", headers="targets/x86_64-linux/include") / "targets/x86_64-linux/include"
    run = run_setup(tmp_path, CUDA_HOME=str(tmp_path / "conda"))
    assert run.stdout.startswith(f"extension mixout_kernels._cuda ['cudart'] ['{headers}'] {tmp_path / 'conda'} ")


def test_the_toolkit_of_pip(tmp_path):
    """It lies beside torch, has no nvcc on PATH, and its library only a versioned name."""
    home = make_toolkit(tmp_path / "nvidia" / "cu13")
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    run = run_setup(tmp_path, toolkit=None)
    assert run.stdout.startswith(f"extension mixout_kernels._cuda [':libcudart.so.13'] [] {home} ")


def test_a_cuda_home_that_is_none(tmp_path):
    """Another toolkit is used, and said to be; without one the message has what was expected, where, and the cure."""
    wrong = program(tmp_path / "wrong" / "bin" / "nvcc").parents[1]
    home = make_toolkit(tmp_path / "a" / "nvidia" / "cu13")
    run = run_setup(tmp_path / "a", CUDA_HOME=str(wrong))
    assert f" {home} " in run.stdout
    assert run.stderr == (
        f"mixout_kernels: warning: CUDA_HOME={wrong} has no bin/nvcc and include/cuda_runtime_api.h; "
        f"building with {home}\n"
    )
    run = run_setup(tmp_path / "b", CUDA_HOME=str(wrong))
    assert run.stderr == (
        "mixout_kernels: installing without the CUDA kernels (no CUDA toolkit, a folder with bin/nvcc and "
        f"include/cuda_runtime_api.h, in {wrong}, {tmp_path / 'b' / 'nvidia' / 'cu13'}, /usr/local/cuda; "
        "install the CUDA toolkit 13.0, or point CUDA_HOME at it)\n"
    )


# --- which GPUs -------------------------------------------------------------------------------------------------------


def runs_on(gpu, architectures):
    """Code runs on its own major version from its own minor one on; PTX, on every GPU from its own version on."""
    for name in architectures.split(";"):
        major, minor = map(int, name.removesuffix("+PTX").split("."))
        if (major, minor) <= gpu and (name.endswith("+PTX") or major == gpu[0]):
            return True
    return False


@pytest.mark.parametrize("toolkit", ["12.6", "12.8", "13.0"])
def test_every_gpu_is_served_by_default(tmp_path, toolkit):
    architectures = run_setup(tmp_path, toolkit=toolkit, torch_cuda=toolkit).stdout.split()[-1]
    gpus = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]
    assert [gpu for gpu in gpus if not runs_on(gpu, architectures)] == []
    assert ("12.0" in architectures) == (toolkit != "12.6")  # nvcc 12.6 knows no 10.0


@pytest.mark.parametrize(
    ("wanted", "built", "left_out"),
    [
        ("9.0a", "9.0a", ""),
        ("Ampere 10.0;;12.0+PTX", "Ampere;10.0;12.0+PTX", ""),
        ("5.2 6.1 7.0 7.5 8.0 9.0+PTX", "8.0;9.0+PTX", "5.2 6.1 7.0 7.5"),
        ("7.5+PTX;Ampere+Tegra", "Ampere+Tegra", "7.5+PTX"),
        (
            "Kepler+Tesla;Maxwell;Pascal;Volta+Tegra;Turing;Hopper",
            "Hopper",
            "Kepler+Tesla Maxwell Pascal Volta+Tegra Turing",
        ),
        ("", "8.0+PTX;9.0;10.0;12.0+PTX", ""),
    ],
)
def test_gpus_that_are_too_old_are_left_out(tmp_path, wanted, built, left_out):
    run = run_setup(tmp_path, TORCH_CUDA_ARCH_LIST=wanted)
    assert run.stdout.endswith(f" {built}\n")
    reason = "the CUDA kernels need compute capability 8.0 or later"
    assert run.stderr == (f"mixout_kernels: warning: leaving out {left_out}: {reason}\n" if left_out else "")


def test_nothing_but_gpus_that_are_too_old(tmp_path):
    reason = (
        "TORCH_CUDA_ARCH_LIST='7.0 Turing' names no GPU of compute capability 8.0 or later, which the kernels need; "
        "add one, or unset it"
    )
    left = run_setup(tmp_path / "auto", TORCH_CUDA_ARCH_LIST="7.0 Turing")
    assert (left.returncode, left.stdout) == (0, "")
    assert left.stderr == f"mixout_kernels: installing without the CUDA kernels ({reason})\n"
    asked = run_setup(tmp_path / "asked", TORCH_CUDA_ARCH_LIST="7.0 Turing", MIXOUT_KERNELS_CUDA="1")
    assert asked.returncode == 1
    assert asked.stderr == f"MIXOUT_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {reason}\n"


# --- whether at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "reason"),
    [
        (None, "13.0", "no CUDA toolkit, a folder with bin/nvcc and include/cuda_runtime_api.h, in "),
        ("13.0", None, "torch 2.13.0 is a build without CUDA; install a CUDA build of torch"),
        ("12.8", "13.0", "nvcc is of CUDA 12.8, torch 2.13.0 of CUDA 13.0"),
    ],
)
def test_cuda_that_cannot_be_built(tmp_path, toolkit, torch_cuda, reason):
    """Left to itself the rest is built; asked for, it is one clear error."""
    left = run_setup(tmp_path / "auto", toolkit=toolkit, torch_cuda=torch_cuda, MIXOUT_KERNELS_CPU="auto")
    assert left.returncode == 0
    assert left.stdout.startswith("extension mixout_kernels._C ")
    assert "extension mixout_kernels._cuda" not in left.stdout
    notice = "" if torch_cuda is None else f"mixout_kernels: installing without the CUDA kernels ({reason}"
    assert left.stderr[: len(notice) or None] == notice  # silent beside a torch that has no CUDA

    asked = run_setup(tmp_path / "asked", toolkit=toolkit, torch_cuda=torch_cuda, MIXOUT_KERNELS_CUDA="1")
    assert asked.returncode == 1
    assert asked.stderr.startswith(f"MIXOUT_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    assert "Traceback" not in asked.stderr
    assert asked.stderr.count("\n") == 1


def test_cuda_that_is_not_wanted(tmp_path):
    run = run_setup(tmp_path, toolkit=None, MIXOUT_KERNELS_CUDA="0")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_minor_mismatch_is_a_warning(tmp_path):
    run = run_setup(tmp_path, toolkit="13.1")
    assert run.stdout.startswith("extension mixout_kernels._cuda")
    assert run.stderr.startswith("mixout_kernels: warning: nvcc is of CUDA 13.1, torch 2.13.0 of CUDA 13.0")


@pytest.mark.parametrize(("build", "reason"), [("check", "no such compiler"), ("compile", "no such instruction")])
def test_a_failed_build_leaves_the_others_alone(tmp_path, build, reason):
    """Be it torch's check of the compilers, made once for all extensions, or the compilation of this one."""
    run = run_setup(tmp_path / "auto", BUILD=build, MIXOUT_KERNELS_CPU="auto")
    assert run.returncode == 0
    assert run.stdout.splitlines()[2:] == ["built mixout_kernels._C"]
    assert run.stderr == f"mixout_kernels: installing without mixout_kernels._cuda, whose build failed: {reason}\n"
    asked = run_setup(tmp_path / "asked", BUILD=build, MIXOUT_KERNELS_CUDA="1")
    assert asked.returncode == 1
    assert f"RuntimeError: {reason}" in asked.stderr


RUN_BUILD = """
import runpy, sys, torch
torch.version.cuda = "12.8"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
sys.argv = ["setup.py", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize(("wanted", "code"), [("auto", 0), ("1", 1)])
def test_a_compiler_that_is_too_new_for_nvcc(tmp_path, wanted, code):
    """The check of torch itself, with its own list of compilers."""
    compiler = program(tmp_path / "bin" / "g++", "echo 99.1.0")
    program(tmp_path / "bin" / "ninja")
    run = subprocess.run(
        [sys.executable, "-c", RUN_BUILD, tmp_path / "built"],
        cwd=ROOT,
        env={
            "PATH": str(tmp_path / "bin"),
            "CXX": str(compiler),
            "CUDA_HOME": str(make_toolkit(tmp_path / "cuda", "12.8")),
            "MIXOUT_KERNELS_CPU": "0",
            "MIXOUT_KERNELS_CUDA": wanted,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == code, run.stderr
    assert "(99.1.0) is greater than the maximum required version by CUDA 12.8" in run.stderr
    assert ("installing without mixout_kernels._cuda, whose build failed: The current" in run.stderr) == (code == 0)
