"""The CPU's float32 GEMM by each kind of vector: what the suite does not run here by itself.

Which one is taken is decided once in a process, by the CPU and by ONEDNN_MAX_CPU_ISA.
"""

import os
import subprocess
import sys

import pytest

from mixout_kernels.backends import cpu

from .conftest import ROOT

VECTORS = cpu._C.cpu_product_vectors() if cpu._HAS_PRODUCT else "none"

pytestmark = pytest.mark.skipif(VECTORS == "none", reason="NO AVX2 HERE: float32 is staged")

# Bytes of y, dx and dw as a checksum, for shapes with tails in every direction, both layouts of the weight, both kinds
# of packing, and more columns and depth than one block has.
PROGRAM = """
import zlib, torch
from mixout_kernels.backends import cpu
from mixout_kernels.backends.contract import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw, strides_of

torch.set_num_threads({threads})
torch.manual_seed(0)
for rows, inputs, outputs in [(1, 1, 1), (5, 7, 9), (15, 33, 17), (37, 200, 801), (70, 450, 31), (29, 850, 395)]:
    x, g, bias = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs)
    w, u = torch.randn(outputs, inputs), torch.randn(outputs, inputs)
    for transposed in (False, True):
        if transposed:
            w, u = w.t().contiguous().t(), u.t().contiguous().t()
        for kind in ("neuron", "weight"):
            for target in (u, None):
                draw = Draw(torch.tensor([3]), 0.5, strides_of(kind, w.shape))
                phi, gradient = MixedWeight(w, target, None, draw), WeightGradient(draw, 2.0, None)
                y, saved = cpu.mix_linear(x, phi, bias, gradient, "fused")
                saved = saved if draw.by_column else x
                dx, dw, _ = cpu.mix_linear_backward(g, saved, phi, gradient, (True, True, False), "fused")
                for t in (y, dx, dw):
                    assert t.isfinite().all()
                    print(zlib.crc32(t.contiguous().numpy().tobytes()), end=" ")
"""


def run(isa, *arguments):
    command = [sys.executable, *arguments]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def vectors(isa):
    answer = run(isa, "-c", "from mixout_kernels.backends import cpu; print(cpu._C.cpu_product_vectors())")
    return answer.stdout.strip()


def test_onednn_max_cpu_isa_is_followed():
    assert vectors("SSE41") == vectors("AVX") == "none"
    assert vectors("AVX2") == vectors("AVX2_VNNI") == "avx2"
    assert vectors("AVX512_CORE") == vectors("AVX512_CORE_AMX") == vectors("DEFAULT") == vectors("ALL") == VECTORS


@pytest.mark.skipif(VECTORS != "avx512", reason="the whole suite runs on AVX2 here")
def test_avx2_in_place_of_avx_512():
    tests = ["tests/test_exact.py", "tests/test_mix_linear.py", "tests/test_cpu_draws.py"]
    answer = run("AVX2", "-m", "pytest", "-q", "--backend", "cpu", "-k", "not bfloat16 and not float16", *tests)
    assert answer.returncode == 0, answer.stdout
    assert " passed" in answer.stdout


@pytest.mark.skipif(VECTORS != "avx512", reason="NO AVX-512 HERE")
def test_every_width_gives_the_same_bits():
    """A sum is taken in the order of its k, block by block of the depth, whatever the vectors and the threads."""
    answers = [run(isa, "-c", PROGRAM.format(threads=threads)) for isa in ("AVX2", "AVX512_CORE") for threads in (1, 3)]
    assert not any(answer.returncode for answer in answers), answers[0].stderr
    assert len(answers[0].stdout.split()) == 6 * 2 * 2 * 2 * 3
    assert len({answer.stdout for answer in answers}) == 1
