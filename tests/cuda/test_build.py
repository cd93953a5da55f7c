"""The compiled module of the CUDA kernels, the code in it, and what is said when it does not fit the present torch.

No CUDA build of torch is needed: the module knows no torch type.
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
    (folder / "digest.h").write_text('#define MIXOUT_DIGEST "unknown"\n')  # which setup.py writes
    toolkits = Path(torch.__file__).parent, nvcc_folder()
    includes = [folder, sysconfig.get_path("include"), *(path / "include" for path in toolkits)]
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
