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
from mixout_kernels import _extension
from tools import codegen_cuda

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
    """Nor does mix wait between its loads, or store in pieces. sm_80 has the fewest instructions to work with;
    `make codegen` does the same for the later ones.
    """
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


# What mix<bf16, bf16, bf16, 1> has to do: a Philox multiplication below its eight loads and above the wait for them.
SEED, SEED_WAIT = ("LDG.E.64.STRONG.SM R2, [R2.64]", 2, 0), ("NOP", 7, 1 << 2)
LOAD, MASK, CALL = ("LDG.E.128 R4, [R8.64]", 5, 0), ("IMAD.WIDE.U32 R4, R2, -0x2daee0ad, RZ", 7, 0), ("CALL", 7, 63)
MIX, STORE = ("FADD R4, R4, -R8", 7, 1 << 5), ("STG.E.128 [R6.64], R4", 7, 0)


@pytest.mark.parametrize(
    ("instructions", "found"),
    [
        ([SEED, SEED_WAIT, *[LOAD] * 8, MASK, CALL, MASK, MIX, *[STORE] * 4], None),
        ([SEED, SEED_WAIT, LOAD, MIX, *[LOAD] * 7, MASK, *[STORE] * 4], "1 + 4, mask after the wait"),
        ([SEED, SEED_WAIT, *[LOAD] * 8, MIX, MASK, *[STORE] * 4], "8 + 4, mask after the wait"),
        ([SEED, SEED_WAIT, *[LOAD] * 4, MASK, MIX, *[LOAD] * 4, *[STORE] * 4], "4 + 4"),
        ([SEED, SEED_WAIT, *[LOAD] * 8, MASK, MIX, *[("STG.E [R6.64], R4", 7, 0)] * 16], "8 + 0"),
    ],
    ids=["as it shall be", "one by one", "mask afterwards", "two round trips", "narrow stores"],
)
def test_codegen_sees_narrow_and_serial_accesses(instructions, found):
    """Its reading of a listing: the text of an instruction, the scoreboard that it sets, those that it waits for."""
    lines = [
        f"        /*{16 * i:04x}*/                   {text} ;  /* 0x{i:016x} */\n"
        f"                                           /* 0x{scoreboard << 46 | waits << 52:016x} */\n"
        for i, (text, scoreboard, waits) in enumerate(instructions)
    ]
    name = "_Z10mix_kernelI4bf16S0_S0_Li1EEvv"
    ptxas = (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 108 registers, used 0 barriers\n"
    )
    (use,) = codegen_cuda.parse(ptxas, f"\t\tFunction : {name}\n" + "".join(lines))
    assert use.kernel == "mix<bf16, bf16, bf16, 1>"
    problem = f"sm_80 {use.kernel}: 16-byte loads + stores {found}, expected 8 + 4"
    assert use.problem == (None if found is None else problem)


@pytest.mark.parametrize(
    ("skip_copies", "expected"),
    [("@P0 BRA 0x50", 7), ("BRA 0x50", 5)],
    ids=["a stage is copied", "nothing is"],
)
def test_codegen_counts_the_instructions_of_a_stage(skip_copies, expected):
    """Of the ways through the loop the one with all copies and products that passes by the mask."""
    texts = [
        "MOV R1, c[0x0][0x28]",
        "ISETP.GE.AND P0, PT, R2, R3, PT",  # the loop begins here, at 0x10
        skip_copies,
        "LDGSTS.E.BYPASS.128 [R4], [R6.64]",
        "LDGSTS.E.BYPASS.128 [R4+0x1000], [R8.64]",
        "@!P1 BRA 0x80",
        "IMAD.WIDE.U32 R4, R2, -0x2daee0ad, RZ",
        "IMAD.WIDE.U32 R4, R2, -0x2daee0ad, RZ",
        "HMMA.16816.F32.BF16 R8, R4, R6, R8",
        "@P2 BRA 0x10",
        "EXIT",
    ]
    listing = "".join(
        f"        /*{16 * i:04x}*/   {text} ;  /* 0x{i:016x} */\n   /* 0x{i:016x} */\n" for i, text in enumerate(texts)
    )
    assert codegen_cuda.stage_instructions(listing) == expected
    assert codegen_cuda.stage_instructions(listing.replace("HMMA", "FFMA")) is None


def test_the_module_loads_and_its_errors_name_the_kernel(built):
    folder, _ = built
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, on which the launch below does not fail")
    program = """
import _cuda
plan = _cuda.plan_product(64, 4096, 4096, _cuda.Type.bfloat16, _cuda.Type.bfloat16, 132)
print(plan.splits, plan.partial_floats, plan.arrivals)
try:
    _cuda.keep_mask(_cuda.Mask(0, 0.5, 0, 0, 1, 1), 0, 1, 4, 0)
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
