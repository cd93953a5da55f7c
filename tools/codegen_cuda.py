"""What nvcc makes of csrc/cuda: registers, shared memory, spills and 16-byte accesses of every kernel, without a GPU.

    python -m tools.codegen_cuda                  writes docs/codegen_cuda.md
    python -m tools.codegen_cuda --check          writes nothing

Either way it fails if a kernel spills or has more registers than its threads can have, and if `mix` does not ask for
all of w and u before it waits for any of them, computes some of the mask only after that wait, or stores in less than
16 bytes. This is read off the listing, from top to bottom and with no regard to branches: it shows that nothing makes
a thread wait early, not how long a thread waits on a GPU. cuobjdump comes from PATH, else from the triton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
PAGE = REPOSITORY / "docs" / "codegen_cuda.md"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
FLAGS = ("-O3", "--fmad=false")  # as in setup.py
THREADS = 256  # of every kernel
REGISTER_LIMIT = min(255, 65536 // THREADS)

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/ +(?P<text>[^;]+?) *; +/\* 0x[0-9a-f]{16} \*/\s+/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)
# "@!P0 BRA 0x90d0", "BRA 0x90d0", "@P0 BRA P1, 0x4840", "BRA.U UP0, 0x4840"
_BRANCH = re.compile(r"(?P<condition>@!?U?P\w+ )?BRA\S* (?P<also>[!~]?U?[PR]\w+, )?`?\(?0x(?P<to>[0-9a-f]+)")
_MIX = re.compile(r"mix<(\w+), (\w+), (\w+), \d+>")
MIX_ELEMENTS = 32  # of a thread: kThreadRows * kThreadColumns
_PHILOX_FACTOR = re.compile(r"0xd2511f53|0xcd9e8d57|-0x2daee0ad|-0x326172a9")  # as nvcc writes them


@dataclass(frozen=True)
class WideAccesses:
    """16-byte accesses to global memory. The wait is the first one for any of the loads."""

    loads_before_wait: int
    stores: int
    mask_before_wait: bool = True  # every multiplication of Philox

    def __str__(self) -> str:
        late = "" if self.mask_before_wait else ", mask after the wait"
        return f"{self.loads_before_wait} + {self.stores}{late}"


@dataclass(frozen=True)
class KernelUse:
    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int
    static_shared_bytes: int
    wide: WideAccesses | None = None  # of mix alone
    stage_instructions: int | None = None  # of mix_product alone

    @property
    def problem(self) -> str | None:
        if self.spilled_bytes:
            return f"{self.architecture} {self.kernel}: {self.spilled_bytes} bytes spilled"
        if self.registers > REGISTER_LIMIT:
            return f"{self.architecture} {self.kernel}: {self.registers} registers, the limit is {REGISTER_LIMIT}"
        if (expected := _mix_accesses(self.kernel)) != self.wide:
            return f"{self.architecture} {self.kernel}: 16-byte loads + stores {self.wide}, expected {expected}"
        return None


def _mix_accesses(kernel: str) -> WideAccesses | None:
    """What a thread of ``mix`` has to move."""
    types = _MIX.fullmatch(kernel)
    if not types:
        return None
    w, u, out = (MIX_ELEMENTS * (4 if name == "float" else 2) // 16 for name in types.groups())
    return WideAccesses(w + u, out)


def compile_source(source: Path, architecture: str, result: Path) -> list[KernelUse]:
    """Compiles one .cu file into an object and returns what ptxas says about each of its kernels."""
    compute = architecture.replace("sm_", "compute_")
    command = [
        "nvcc",
        *FLAGS,
        "-Xcompiler",
        "-fPIC",
        "-Xptxas",
        "-v",
        "-gencode",
        f"arch={compute},code={architecture}",
    ]
    run = subprocess.run([*command, "-c", str(source), "-o", str(result)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nvcc cannot compile {source.name} for {architecture}:\n{run.stdout}{run.stderr}")
    return parse(run.stderr, listing(result))


def listing(compiled: Path) -> str:
    return subprocess.run([_cuobjdump(), "-sass", str(compiled)], capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("cuobjdump is neither on PATH nor in an installed triton; it is part of the CUDA toolkit")
    return str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def parse(ptxas: str, sass: str = "") -> list[KernelUse]:
    instructions = {function.split()[0]: function for function in sass.split("Function : ")[1:]}
    uses = []
    for entry in _ENTRY.finditer(ptxas):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernel, code = _readable(entry["name"]), instructions.get(entry["name"], "")
        uses.append(
            KernelUse(
                kernel,
                entry["architecture"],
                int(entry["registers"]),
                int(entry["stores"]) + int(entry["loads"]),
                int(shared[1]) if shared else 0,
                wide_accesses(code) if _MIX.fullmatch(kernel) else None,
                stage_instructions(code) if kernel.startswith("mix_product") else None,
            )
        )
    return uses


def wide_accesses(sass: str) -> WideAccesses:
    """Reads them off the listing of one kernel.

    A load sets a scoreboard, and whatever needs its value waits for that: in the upper half of an instruction bits 46
    to 48 are the one it sets, bits 52 to 57 those it waits for (Jia et al., arXiv:1804.06826; NVIDIA documents
    neither). Calls wait for all of them and are passed over: a neuron mask of several elements to a feature divides by
    their number in a subroutine.
    """
    instructions = [(match["text"], int(match["high"], 16)) for match in _INSTRUCTION.finditer(sass)]
    loads = [i for i, (text, _) in enumerate(instructions) if "LDG.E.128" in text]
    scoreboards = {instructions[i][1] >> 46 & 7 for i in loads}
    wait = next(
        (
            i
            for i, (text, high) in enumerate(instructions)
            if i > min(loads, default=i) and "CALL" not in text and any(high >> 52 + s & 1 for s in scoreboards)
        ),
        len(instructions),
    )
    return WideAccesses(
        loads_before_wait=sum(i < wait for i in loads),
        stores=sum("STG.E.128" in text for text, _ in instructions),
        mask_before_wait=not any(_PHILOX_FACTOR.search(text) for text, _ in instructions[wait:]),
    )


def stage_instructions(sass: str) -> int | None:
    """What a warp of a fused GEMM issues for one stage, the mask aside; None for a kernel without tensor cores.

    It is read off the ways through the loop around the tensor cores: of those that have the most tensor-core
    instructions and asynchronous copies together, the one with the fewest instructions. That one copies a stage by
    16 bytes, multiplies a stage, and finds no mask to fill.
    """
    instructions = [(int(match["address"], 16), match["text"]) for match in _INSTRUCTION.finditer(sass)]
    place = {address: i for i, (address, _) in enumerate(instructions)}
    branches = [_BRANCH.match(text) for _, text in instructions]
    targets = [branch and place.get(int(branch["to"], 16)) for branch in branches]
    products = [i for i, (_, text) in enumerate(instructions) if "HMMA" in text]
    if not products:
        return None
    start, end = max(
        (target, i)
        for i, target in enumerate(targets)
        if target is not None and target <= products[0] and i >= products[-1]
    )
    # From each instruction to the jump back: what of use is on the best way, and minus its length.
    best: dict[int, tuple[int, int]] = {end: (0, -1)}
    for i in range(end - 1, start - 1, -1):
        branch, target = branches[i], targets[i]
        ways = [best[i + 1]] if i + 1 in best and not (branch and not (branch["condition"] or branch["also"])) else []
        if target in best:
            ways.append(best[target])
        if ways:
            useful, length = max(ways)
            best[i] = useful + ("HMMA" in instructions[i][1] or "LDGSTS" in instructions[i][1]), length - 1
    return -best[start][1]


def _readable(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void |\(anonymous namespace\)::|mixout::cuda::|\(bool\)|\(int\)", "", name)
    name = name.partition("(")[0].replace("_kernel", "")
    for contiguous, layout in (("true", "[out, in]"), ("1", "[out, in]"), ("false", "[in, out]"), ("0", "[in, out]")):
        name = name.replace(f", {contiguous}, ", f", {layout}, ")
    return name


def compile_all(architectures: Iterable[str], jobs: int) -> list[KernelUse]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        work = [
            (source, arch, Path(folder) / f"{source.stem}_{arch}.o") for arch in architectures for source in SOURCES
        ]
        return [use for uses in pool.map(lambda arguments: compile_source(*arguments), work) for use in uses]


def page(uses: list[KernelUse], compiler: str) -> str:
    architectures = sorted({use.architecture for use in uses}, key=lambda name: int(re.sub(r"\D", "", name)))
    cells: dict[str, dict[str, str]] = {}
    for use in uses:
        cell = [str(use.registers)]
        if use.spilled_bytes:
            cell.append(f"{use.spilled_bytes} B spilled")
        if use.static_shared_bytes:
            cell.append(f"{use.static_shared_bytes} B static shared memory")
        if use.wide:
            cell.append(str(use.wide))
        if use.stage_instructions:
            cell.append(f"{use.stage_instructions} a stage")
        cells.setdefault(use.kernel, {})[use.architecture] = ", ".join(cell)
    spilling = sum(1 for use in uses if use.spilled_bytes)
    lines = [
        "# What nvcc makes of csrc/cuda",
        "",
        f"Written by `python -m tools.codegen_cuda`; nvcc {compiler}, flags `{' '.join(FLAGS)}`. Registers per",
        f"thread; every kernel has {THREADS} threads to a block, hence at most {REGISTER_LIMIT}.",
        f"{len(uses)} kernels were compiled, {spilling} spill. None of this was timed.",
        "",
        "Shared memory is dynamic. `mix_product` takes 2 to 4 stages of 32 to 48 KB, as many as the device has room",
        "for, and at most 3 KB for the mask: two of the largest fit the 99 KB of sm_86, sm_89 and sm_120. The column",
        "kernels take 64 bytes, or 9 KB where `scatter_kept` sums the gradient of the bias too; `mix` none.",
        "",
        "`mix_product<weight, target, input, weight in memory as, rows>` is the fused forward and dx. Where it uses",
        "tensor cores its registers are followed by the instructions that a warp issues for a stage, the mask aside.",
        "`mix<weight, target, result, table size>` is the mix of one or of many weights. After its registers stand its",
        "16-byte accesses, loads + stores: the loads of w and u that a thread asks for before it waits for any of",
        "them, with the mask computed meanwhile.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for kernel, registers in sorted(cells.items()):
        lines.append(f"| `{kernel}` | {' | '.join(registers.get(arch, '') for arch in architectures)} |")
    return "\n".join(lines) + "\n"


def compiler_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text)[1]  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write the page")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    arguments = parser.parse_args()
    if not shutil.which("nvcc"):
        sys.exit("tools.codegen_cuda: nvcc is not on PATH; nothing was checked")
    uses = compile_all(ARCHITECTURES, arguments.jobs)
    text = page(uses, compiler_version())
    print(text)
    if not arguments.check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    if problems := [use.problem for use in uses if use.problem]:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
