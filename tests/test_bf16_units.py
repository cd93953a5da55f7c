"""The CPU's bfloat16 GEMM by each instruction that multiplies pairs: what the suite does not run here by itself.

Which one is taken is decided once in a process, by the CPU and by ONEDNN_MAX_CPU_ISA.
"""

import os
import subprocess
import sys

import pytest
import torch

from mixout_kernels.backends import cpu

from .conftest import ROOT

pytestmark = pytest.mark.skipif(cpu._BF16_UNIT == "none", reason="NO AVX512_BF16 HERE: bfloat16 is staged")


def run(isa, *arguments):
    command = [sys.executable, *arguments]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("isa", "units"),
    [
        ("AVX512_CORE", ["none"]),
        ("AVX512_CORE_BF16", ["dot"]),
        ("AVX512_CORE_AMX", ["dot", "tiles"]),
        ("DEFAULT", ["dot", "tiles"]),
    ],
)
def test_onednn_max_cpu_isa_is_followed(isa, units):
    answer = run(isa, "-c", "from mixout_kernels.backends import cpu; print(cpu._BF16_UNIT)")
    assert answer.stdout.strip() in units, answer.stderr


@pytest.mark.skipif(cpu._BF16_UNIT != "tiles", reason="the whole suite runs on vdpbf16ps here")
def test_the_dot_product_instruction_in_place_of_amx():
    tests = ["tests/test_exact.py", "tests/test_autocast.py"]
    answer = run("AVX512_CORE_BF16", "-m", "pytest", "-q", "--backend", "cpu", "-k", "bfloat16", *tests)
    assert answer.returncode == 0, answer.stdout
    assert " passed" in answer.stdout


def test_auto_is_staged_for_many_rows_with_amx_alone(monkeypatch):
    w = torch.randn(40, 30)
    phi = cpu.MixedWeight(w, None, None, None)
    for unit, rows, fused in [("none", 1, False), ("dot", 5000, True), ("tiles", 2047, True), ("tiles", 2048, False)]:
        monkeypatch.setattr(cpu, "_BF16_UNIT", unit)
        assert cpu._is_fused("auto", torch.empty(rows, 30, dtype=torch.bfloat16), phi) == fused
        assert cpu.premixing_pays(torch.bfloat16)
