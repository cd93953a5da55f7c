"""What ptxas makes of every Triton kernel in every configuration that ships. Needs no GPU.

    python -m tools.codegen_triton [--arch 90] [--write docs/codegen_triton.md]

The launchers of the backend are called as they ship, on CPU tensors, with a driver that compiles for a given GPU and
launches nothing; so the configurations are theirs and are not written down here a second time. It fails if a kernel is
out of the bounds of ``problems``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mixout_kernels.backends import triton as backend
from mixout_kernels.backends.triton import columns, fused_linear, mix, mix_list, weight_gradient
from mixout_kernels.draws import Draw, strides_of

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block can have
REGISTERS = 64 * 1024  # of a block
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
_SHORT = {_BF16: "bf16", _F16: "fp16", _F32: "fp32"}
_ROWS = (16, 64, 256)  # one for each tile of 16-bit products in fused_linear.tile_for
_OUT, _IN, _KEPT, _P = 512, 1024, 352, 0.7


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture."""

    name: str
    configuration: str
    arch: int
    warps: int
    stages: int
    registers: int
    shared: int
    local: int
    tensor_core: int
    any_tensor_core: int  # an older generation's, too
    wide_loads: int

    @property
    def most_registers(self) -> int:
        return min(255, REGISTERS // (32 * self.warps))


@dataclass(frozen=True)
class Case:
    """A launch: the dtypes, draw, layout and shape that choose a configuration, in words, and the call."""

    configuration: str
    launch: Callable[[], object]
    tensor_cores: bool | None = None  # whether a product must run on them or must not; None where there is no product


def cases() -> list[Case]:
    return [*_mask_cases(), *_mix_cases(), *_column_cases(), *_fused_cases(), *_weight_gradient_cases()]


def compile_case(case: Case, arch: int) -> Compiled:
    with _compiling_for(arch) as compiled:
        case.launch()
    (kernel,) = compiled
    return _describe(kernel, case.configuration, arch)


def problems(kernel: Compiled, case: Case) -> list[str]:
    """What forbids to ship it, a sentence each."""
    found = []
    if kernel.local:
        found.append(f"{kernel.local} loads and stores of spilled registers")
    if kernel.registers > kernel.most_registers:
        found.append(f"{kernel.registers} registers, of {kernel.most_registers}")
    if kernel.shared > SHARED_MEMORY[kernel.arch]:
        found.append(f"{kernel.shared} bytes of shared memory, of {SHARED_MEMORY[kernel.arch]}")
    if case.tensor_cores and not kernel.tensor_core:
        found.append(f"no {TENSOR_CORES[kernel.arch]}")
    if case.tensor_cores is False and kernel.any_tensor_core:
        found.append(f"{kernel.any_tensor_core} tensor-core instructions, which round IEEE float32 to TF32")
    return found


class _CompileOnly:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch  # Triton caches kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


@contextmanager
def _compiling_for(arch: int) -> Iterator[list[triton.compiler.CompiledKernel]]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 was set when triton was imported: nothing is compiled in this process")
    compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: object, **options: object) -> None:
        options["warmup"] = True
        compiled.append(run(self, *arguments, **options))

    slot = "_active" if hasattr(driver, "_active") else "active"  # triton 3.4 has the second alone, of torch 2.8
    previous = getattr(driver, slot)
    driver.set_active(_CompileOnly(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(fused_linear, "shared_memory", return_value=SHARED_MEMORY[arch]),
        ):
            yield compiled
    finally:
        setattr(driver, slot, previous)


def _describe(kernel: triton.compiler.CompiledKernel, configuration: str, arch: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _output("cuobjdump", "-res-usage", cubin.name)
        sass = _output("nvdisasm", "-ndf", "-c", cubin.name)
    return Compiled(
        name=kernel.metadata.name.strip("_").removesuffix("_kernel"),
        configuration=configuration,
        arch=arch,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        shared=kernel.metadata.shared,
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        tensor_core=len(re.findall(rf"\b{TENSOR_CORES[arch]}\b", sass)),
        any_tensor_core=len(re.findall(rf"\b(?:{'|'.join(TENSOR_CORES.values())})\b", sass)),  # not HFMA2.MMA
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b", sass)),
    )


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


# --- the configurations -----------------------------------------------------------------------------------------------


# (kind of mask, offset): a path through mask.keep_tile each. With _ODD columns runs of four do not lie side by side,
# and _RUNS takes a Philox call per element.
_LINE, _ODD_LINE, _RUNS, _ROW, _ONE = ("neuron", 0), ("neuron", 5), ("weight", 0), ("output", 0), ("layer", 0)
_ODD = 1001
_DrawSpec = tuple[str, int]


def _draw(spec: _DrawSpec, shape: Sequence[int] = (_OUT, _IN)) -> Draw:
    kind, offset = spec
    return Draw(torch.zeros(1, dtype=torch.int64), _P, strides_of(kind, shape), offset)


def _words(spec: _DrawSpec) -> str:
    kind, offset = spec
    return f"{kind} from {offset}" if offset else kind


def _weight(dtype: torch.dtype, layout: str, out: int = _OUT, columns: int = _IN) -> Tensor:
    return (
        torch.empty(columns, out, dtype=dtype).t() if layout == "[in, out]" else torch.empty(out, columns, dtype=dtype)
    )


def _mask_cases() -> Iterator[Case]:
    for kind, shape in (("neuron", (_IN,)), ("weight", (_OUT, _IN)), ("output", (_OUT, _IN))):
        yield Case(f"{kind}, {len(shape)}-D", partial(backend.keep_mask, _draw((kind, 0), shape), shape))


def _mix_cases() -> Iterator[Case]:
    for w, u, phi in ((_BF16,) * 3, (_F32,) * 3, (_F32, _F32, _BF16), (_F32, _BF16, _BF16)):
        for spec in (_LINE, _RUNS, _ROW) if w == u == phi else (_LINE, _RUNS):
            for layout in ("[out, in]", "[in, out]"):
                what = f"{_SHORT[w]}, {_SHORT[u]} to {_SHORT[phi]}, {_words(spec)}, {layout}"
                yield Case(what, partial(_mix, w, u, phi, spec, layout))
                if phi == _BF16 and u == _BF16:
                    yield Case(what, partial(_mix_list, w, u, phi, spec, layout))
    yield Case("fp16, fp16 to fp16, neuron, [out, in]", partial(_mix, _F16, _F16, _F16, _LINE, "[out, in]"))
    for dtype in (_BF16, _F32):
        for spec in (_LINE, _RUNS, _ONE):
            what = f"{_SHORT[dtype]}, {_words(spec)}, no target"
            yield Case(what, partial(_mix, dtype, None, dtype, spec, "[out, in]"))
    for dtype in (_BF16, _F32):
        for spec, layout in ((_ODD_LINE, "[out, in]"), (_RUNS, "[out, in]"), (_RUNS, "[in, out]")):
            what = f"{_SHORT[dtype]}, odd width, {_words(spec)}, {layout}"
            yield Case(what, partial(_mix, dtype, dtype, dtype, spec, layout, columns=_ODD))
            yield Case(what, partial(_mix_list, dtype, dtype, dtype, spec, layout, columns=_ODD))
        strided = torch.empty(_OUT, 2 * _ODD, dtype=dtype)[:, ::2]
        what = f"{_SHORT[dtype]}, odd width, weight, every other column"
        yield Case(what, partial(mix.mix_into, strided, strided, strided, _draw(_RUNS, strided.shape), 1.5))
    for spec in (_LINE, _ROW):
        kernel = torch.empty(64, 64, 3, 3)
        what = f"fp32, convolution, {_words(spec)}"
        yield Case(what, partial(backend.mixout, kernel, kernel, _draw(spec, kernel.shape), 1.5))


def _mix(
    w: torch.dtype, u: torch.dtype | None, phi: torch.dtype, spec: _DrawSpec, layout: str, columns: int = _IN
) -> None:
    weight, target, out = (None if dtype is None else _weight(dtype, layout, columns=columns) for dtype in (w, u, phi))
    mix.mix_into(out, weight, target, _draw(spec, weight.shape), 1.5)


def _mix_list(
    w: torch.dtype, u: torch.dtype, phi: torch.dtype, spec: _DrawSpec, layout: str, columns: int = _IN
) -> None:
    weights, targets, outs = [[_weight(dtype, layout, columns=columns) for _ in range(3)] for dtype in (w, u, phi)]
    mix_list.mixout_list(outs, weights, targets, [_draw(spec, weight.shape) for weight in weights])


def _column_cases() -> Iterator[Case]:
    for spec in (_LINE, _ODD_LINE):
        draw = _draw(spec)
        for dtype in (_BF16, _F32):
            for layout in ("[out, in]", "[in, out]") if spec == _LINE else ("[out, in]",):
                what = f"{_SHORT[dtype]}, {_words(spec)}, {layout}"
                w, compact = _weight(dtype, layout), _weight(dtype, layout, columns=_KEPT)
                yield Case(what, partial(columns.gather_columns, w, draw, _KEPT))
                yield Case(what, partial(columns.scatter_columns, compact, w, draw, 1.5))
    w, compact = _weight(_F32, "[out, in]"), _weight(_BF16, "[out, in]", columns=_KEPT)
    yield Case("bf16 to fp32, neuron", partial(columns.scatter_columns, compact, w, _draw(_LINE), 1.5))


def _fused_cases() -> Iterator[Case]:
    for direction in ("y", "dx"):
        for spec in (_LINE, _RUNS):
            for rows in _ROWS:
                yield _fused_case(_BF16, _BF16, rows, direction, spec)
                yield _fused_case(_BF16, _F32, rows, direction, spec)
            yield _fused_case(_F32, _F32, 64, direction, spec)
            yield _fused_case(_F32, _F32, 64, direction, spec, tf32=True)
            yield _fused_case(_BF16, _BF16, 64, direction, spec, columns=_ODD)
            yield _fused_case(_BF16, _F32, 64, direction, spec, columns=_ODD)
            yield _fused_case(_F32, _F32, 64, direction, spec, columns=_ODD)
            yield _fused_case(_F32, _F32, 64, direction, spec, tf32=True, columns=_ODD)
        for spec in (_ROW, _ONE, _ODD_LINE):
            yield _fused_case(_BF16, _F32, 64, direction, spec)
            yield _fused_case(_F32, _F32, 64, direction, spec)
            yield _fused_case(_F32, _F32, 64, direction, spec, tf32=True)
        yield _fused_case(_F16, _F16, 64, direction, _LINE)
        yield _fused_case(_BF16, _BF16, 64, direction, _LINE, target=None)
        yield _fused_case(_BF16, _BF16, 64, direction, _LINE, layout="[in, out]")
        yield _fused_case(_BF16, _BF16, 64, direction, _RUNS, layout="[in, out]")


def _fused_case(
    x: torch.dtype,
    w: torch.dtype,
    rows: int,
    direction: str,
    spec: _DrawSpec,
    *,
    tf32: bool = False,
    target: str | None = "target",
    layout: str = "[out, in]",
    columns: int = _IN,
) -> Case:
    dtypes = _SHORT[x] if x == w else f"{_SHORT[x]}, weight {_SHORT[w]}"
    notes = [
        "tf32" if tf32 else "ieee" if x == _F32 else "",
        "" if target else "no target",
        "" if layout == "[out, in]" else layout,
        "" if columns == _IN else "odd width",
    ]
    what = ", ".join(filter(None, [direction, dtypes, _words(spec), f"{rows} rows", *notes]))
    weight = _weight(w, layout, columns=columns)
    frozen = None if target is None else _weight(w, layout, columns=columns)
    draw = _draw(spec, weight.shape)
    if direction == "y":
        gather, width = draw.at(0.8), _KEPT if draw.by_column else 0
        operands = torch.empty(rows, columns, dtype=x), weight, frozen, torch.empty(_OUT, dtype=x), draw
        launch = partial(fused_linear.fused_linear, *operands, gather, width)
    else:
        operands = torch.empty(rows, _OUT, dtype=x), weight, frozen, draw
        launch = partial(fused_linear.fused_input_gradient, *operands)
    return Case(what, partial(_with_tf32, tf32, launch), tensor_cores=tf32 or x != _F32)


def _weight_gradient_cases() -> Iterator[Case]:
    for x, w, tf32 in ((_BF16, _BF16, False), (_BF16, _F32, False), (_F32, _F32, False), (_F32, _F32, True)):
        for spec in (_LINE, _ODD_LINE, _RUNS, _ROW, _ONE):
            for width in (_IN, _ODD) if spec in (_LINE, _RUNS) else (_IN,):
                notes = ["tf32" if tf32 else "ieee" if x == _F32 else "", "odd width" if width == _ODD else ""]
                what = ", ".join(filter(None, [_SHORT[x], f"weight {_SHORT[w]}", _words(spec), "with db", *notes]))
                weight = _weight(w, "[out, in]", columns=width)
                draw = _draw(spec, weight.shape)
                g, saved = torch.empty(64, _OUT, dtype=x), torch.empty(64, _KEPT if draw.by_column else width, dtype=x)
                launch = partial(weight_gradient.fused_weight_gradient, g, saved, weight, draw, 1.5, True)
                yield Case(what, partial(_with_tf32, tf32, launch), tensor_cores=tf32 or x != _F32)


def _with_tf32(tf32: bool, launch: Callable[[], object]) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        launch()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- the table --------------------------------------------------------------------------------------------------------

_HEADER = """# What the Triton kernels compile to

Written by `make codegen` (`python -m tools.codegen_triton --write docs/codegen_triton.md`), without a GPU, with
torch {torch} and triton {triton}. The launchers are called as they ship, so these are the configurations that run.

- registers: per thread; the bound is 65536 / threads, 255 at most.
- shared: bytes of shared memory of a block; the bound is 163 KiB on sm_80 and 227 KiB on sm_90 and sm_100.
- local: loads and stores of local memory (LDL, STL), which is where spilled registers go.
- MMA: tensor-core instructions: HMMA on sm_80, HGMMA (wgmma) on sm_90, UTCHMMA (tcgen05) on sm_100.
- 16 B: loads of 16 bytes, to registers or to shared memory (LDG.128, LDGSTS.128).

It is an error, here and in `tests/triton/test_codegen.py`, if a kernel has local memory or is beyond these bounds, if a
product of 16-bit types or of TF32 has no tensor-core instruction, or if one of IEEE float32 has any.
"""


def table(kernels: Sequence[Compiled]) -> str:
    lines = [
        "| kernel | configuration | arch | warps | stages | registers | shared | local | MMA | 16 B |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for k in kernels:
        lines.append(
            f"| {k.name} | {k.configuration} | sm_{k.arch} | {k.warps} | {k.stages} | {k.registers} | {k.shared} "
            f"| {k.local} | {k.tensor_core} | {k.wide_loads} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of the Triton kernels.")
    parser.add_argument("--arch", type=int, choices=SHARED_MEMORY, action="append", help="default: all of them")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to a Markdown file, too")
    arguments = parser.parse_args()
    compiled = [(case, compile_case(case, arch)) for case in cases() for arch in arguments.arch or SHARED_MEMORY]
    text = table([kernel for _, kernel in compiled])
    print(text)
    if arguments.write:
        header = _HEADER.format(torch=torch.__version__.split("+")[0], triton=triton.__version__)
        arguments.write.write_text(f"{header}\n{text}")
    wrong = [
        f"{kernel.name}, {case.configuration}, sm_{kernel.arch}: {problem}"
        for case, kernel in compiled
        for problem in problems(kernel, case)
    ]
    print(f"{len(compiled)} kernels by triton {triton.__version__}, {len(wrong)} out of bounds")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
