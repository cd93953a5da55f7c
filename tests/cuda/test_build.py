"""setup.py's CUDA part, the module that comes out of it, and what is said when it does not fit the present torch.

No CUDA build of torch is needed: a stand-in torch plays one for setup.py, and the module itself knows no torch type.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mixout_kernels
from benchmarks import codegen_cuda
from mixout_kernels import _extension

ROOT = Path(__file__).resolve().parents[2]

FAKE_TORCH = """
__version__ = "2.13.0"
class version:
    cuda = {cuda!r}
"""
FAKE_CPP_EXTENSION = """
import setuptools
CUDA_HOME = {home!r}
def CppExtension(name, sources, **_):
    return setuptools.Extension(name, sources)
CUDAExtension = CppExtension
class BuildExtension:
    def build_extension(self, extension):
        raise RuntimeError("no such instruction")
"""
RUN_SETUP = """
import os, runpy, setuptools
def setup(cmdclass=None, ext_modules=()):
    for extension in ext_modules:
        print("extension", extension.name, extension.libraries, os.environ.get("TORCH_CUDA_ARCH_LIST"))
        if os.environ.get("BUILD"):
            builder = cmdclass["build_ext"]
            builder.build_extension(object.__new__(builder), extension)
setuptools.setup = setup
runpy.run_path("setup.py")
"""


def run_setup(folder, *, toolkit="13.0", torch_cuda="13.0", **environment):
    """setup.py beside a torch built with CUDA ``torch_cuda`` (None: without) and nvcc ``toolkit`` (None: no nvcc)."""
    fake = folder / "torch" / "utils"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (folder / "torch" / "__init__.py").write_text(FAKE_TORCH.format(cuda=torch_cuda))
    home = None
    if toolkit is not None:
        home = folder / "toolkit"
        (home / "bin").mkdir(parents=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {toolkit}, V{toolkit}.88\n")
        nvcc.chmod(0o755)
    (fake / "cpp_extension.py").write_text(FAKE_CPP_EXTENSION.format(home=home and str(home)))
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("c++", "ninja"):
        (tools / tool).write_text("#!/bin/sh\n")
        (tools / tool).chmod(0o755)
    return subprocess.run(
        [sys.executable, "-c", RUN_SETUP],
        cwd=ROOT,
        env={"PATH": f"{tools}:/bin", "PYTHONPATH": str(folder), "MIXOUT_KERNELS_CPU": "0", **environment},
        capture_output=True,
        text=True,
    )


def test_cuda_is_built_where_it_can_be(tmp_path):
    run = run_setup(tmp_path)
    assert run.stdout == "extension mixout_kernels._cuda ['cudart'] 8.0;9.0;10.0;12.0+PTX\n"
    assert (run.returncode, run.stderr) == (0, "")


def test_architectures(tmp_path):
    assert run_setup(tmp_path / "a", TORCH_CUDA_ARCH_LIST="9.0a").stdout.endswith(" 9.0a\n")
    run = run_setup(tmp_path / "b", toolkit="12.6", torch_cuda="12.6")
    assert run.stdout.endswith(" 8.0;9.0+PTX\n")  # nvcc 12.6 knows no 10.0


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "reason"),
    [
        (None, "13.0", "nvcc is not on PATH, nor in CUDA_HOME; install the CUDA toolkit 13.0"),
        ("13.0", None, "torch 2.13.0 is a build without CUDA; install a CUDA build of torch"),
        ("12.8", "13.0", "nvcc is of CUDA 12.8, torch 2.13.0 of CUDA 13.0"),
    ],
)
def test_cuda_that_cannot_be_built(tmp_path, toolkit, torch_cuda, reason):
    """Left to itself the rest is built; asked for, it is one clear error."""
    left = run_setup(tmp_path / "auto", toolkit=toolkit, torch_cuda=torch_cuda, MIXOUT_KERNELS_CPU="auto")
    assert left.returncode == 0
    assert left.stdout.startswith("extension mixout_kernels._C ")
    assert "_cuda" not in left.stdout
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


def test_a_failed_build_leaves_the_others_alone(tmp_path):
    run = run_setup(tmp_path / "auto", BUILD="1")
    assert run.returncode == 0
    assert "installing without mixout_kernels._cuda, whose build failed: no such instruction" in run.stderr
    asked = run_setup(tmp_path / "asked", BUILD="1", MIXOUT_KERNELS_CUDA="1")
    assert asked.returncode == 1
    assert "RuntimeError: no such instruction" in asked.stderr


# --- the module -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of mixout_kernels._cuda for sm_80 alone, and what ptxas said."""
    if not shutil.which("nvcc"):
        pytest.skip("NO NVCC: the CUDA sources are not compiled here, only their host emulation is run")
    folder = tmp_path_factory.mktemp("built")
    objects = [folder / f"{source.stem}.o" for source in codegen_cuda.SOURCES]
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(codegen_cuda.compile_source, codegen_cuda.SOURCES, ["sm_80"] * len(objects), objects)
        uses = [use for source in compiled for use in source]
    includes = [Path(torch.__file__).parent / "include", sysconfig.get_path("include"), nvcc_folder() / "include"]
    compiler = [os.environ.get("CXX", "c++"), "-O1", "-fPIC", "-std=c++17", "-DTORCH_EXTENSION_NAME=_cuda"]
    bindings = folder / "bindings.o"
    source = ROOT / "csrc" / "cuda" / "bindings.cpp"
    subprocess.run([*compiler, *[f"-I{path}" for path in includes], "-c", source, "-o", bindings], check=True)
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["nvcc", "-shared", *objects, bindings, "-o", module], check=True)
    return folder, uses


def nvcc_folder() -> Path:
    """The toolkit's folder: nvcc on PATH may be a script that starts the one in it."""
    dry = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return Path(next(line.split("=", 1)[1].strip() for line in dry.splitlines() if "#$ _HERE_=" in line)).parent


def test_no_kernel_spills(built):
    """sm_80 has the fewest instructions to work with; `make codegen` does the same for the later ones."""
    _, uses = built
    kernels = {use.kernel.partition("<")[0] for use in uses}
    assert kernels == {"gather_kept", "keep_mask", "mix", "mix_product", "scatter_kept", "scatter_kept_lines"}
    assert [use.problem for use in uses if use.problem] == []


def test_codegen_sees_a_spill():
    """Its reading of ptxas, on what ptxas prints for a kernel that spills."""
    text = (
        "ptxas info    : Compiling entry function '_Z3foov' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z3foov\n"
        "    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size, 16 bytes smem\n"
    )
    (use,) = codegen_cuda.parse(text)
    assert (use.kernel, use.registers, use.spilled_bytes, use.static_shared_bytes) == ("foo", 128, 12, 16)
    assert use.problem == "sm_80 foo: 12 bytes spilled"


def test_the_module_loads_and_its_errors_name_the_kernel(built):
    folder, _ = built
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, on which the launch below does not fail")
    program = """
import _cuda
plan = _cuda.plan_product(64, 4096, 4096, _cuda.Type.bfloat16, _cuda.Type.bfloat16, 132)
print(plan.splits, plan.partial_floats, plan.arrivals)
try:
    _cuda.keep_mask((0, 1), 0, 4, 0)
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    plan, error = run.stdout.splitlines()
    assert plan == f"4 {4 * 64 * 4096} 32"  # 32 tiles for 132 multiprocessors: four blocks share each contraction
    assert error.startswith("mixout_kernels: CUDA kernel keep_mask: ")


# --- loading it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stamp", "torch_cuda", "expected"),
    [
        ("CUDA 12080", "13.0", r"was built for CUDA 12\.8, you have torch \S+ with CUDA 13\.0\. To rebuild it: pip"),
        (
            "CUDA 13000",
            None,
            r"was built for CUDA 13\.0, you have torch \S+, a build without CUDA\. To rebuild it: pip",
        ),
        (
            "CUDA 13000",
            "13.1",
            r"was built for CUDA 13000 and does not load with torch \S+ \(.*\)\. To rebuild it: pip",
        ),
        ("torch 1.0", "13.0", r"was built for torch 1\.0, you have torch \S+\. To rebuild it: pip"),
    ],
)
def test_a_module_that_does_not_fit(tmp_path, monkeypatch, stamp, torch_cuda, expected):
    """A minor version of CUDA apart is tried: the third fails only because the file is no library."""
    (tmp_path / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(
        b"\x7fELF mixout_kernels built for " + stamp.encode() + b"\0"
    )
    monkeypatch.setattr(mixout_kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    module, reason = _extension.load.__wrapped__("_cuda")
    assert module is None
    assert re.search(expected, reason), reason


def test_a_module_that_was_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(mixout_kernels, "__path__", [str(tmp_path)])
    module, reason = _extension.load.__wrapped__("_cuda")
    assert module is None
    assert "has no compiled extension _cuda" in reason
    assert "To build it, have nvcc and a CUDA build of torch" in reason
