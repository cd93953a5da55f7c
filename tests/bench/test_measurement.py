"""The reference check, the roofline's arithmetic, and one whole run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import mixout_kernels as mk
from benchmarks.layers import variants
from benchmarks.layers.agreement import Agreement
from benchmarks.layers.cases import Case, Operands
from benchmarks.layers.measurement import measure
from benchmarks.layers.roofline import Ceilings, work
from benchmarks.layers.sampling import saved_bytes
from benchmarks.layers.variants import variants_for

ROOT = Path(__file__).parents[2]
CASE = Case(48, 64, 80, "fp32")


def operands(case=CASE):
    return Operands.random(case, torch.device("cpu"), torch.Generator().manual_seed(0))


def found(name, case=CASE):
    return next(v for v in variants_for(case, "cpu") if v.name == name)


def verdict_of(variant, case=CASE):
    return Agreement(operands(case), variant.mask, variant.p, variant.target).check(variant)


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_this_packages_layers_match_the_reference(dtype_name):
    case = Case(48, 64, 80, dtype_name)
    ours = [v for v in variants_for(case, "cpu") if v.ours]
    assert len(ours) >= 8
    assert [v.name for v in ours if not verdict_of(v, case).matches] == []


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def _scaled(y):
    return y + 1e-4 * y.detach()


def _nan_in_one_place(y):
    y[0, 0] = float("nan")
    return y


FAULTS = {
    "y": lambda x, w, u, b, **o: _scaled(mk.reference.mix_linear(x, w, u, b, **o)),
    "nan": lambda x, w, u, b, **o: _nan_in_one_place(mk.reference.mix_linear(x, w, u, b, **o)),
    "dx": lambda x, w, u, b, **o: mk.reference.mix_linear(_WrongGradient.apply(x), w, u, b, **o),
    "dw": lambda x, w, u, b, **o: mk.reference.mix_linear(x, _WrongGradient.apply(w), u, b, **o),
    "db": lambda x, w, u, b, **o: mk.reference.mix_linear(x, w, u, _WrongGradient.apply(b), **o),
    "seed": lambda x, w, u, b, seed, **o: mk.reference.mix_linear(x, w, u, b, seed=seed + 1, **o),
    "p": lambda x, w, u, b, p, **o: mk.reference.mix_linear(x, w, u, b, p=p - 1e-3, **o),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_is_slightly_wrong_is_found(monkeypatch, fault):
    def faulty(*args, backend, schedule, **options):
        return FAULTS[fault](*args, **options)

    monkeypatch.setattr(variants.mk, "mix_linear", faulty)
    verdict = verdict_of(found("mixout-neuron-p0.9"))
    assert not verdict.matches
    if fault in ("y", "dx", "dw", "db"):
        assert verdict.where == fault


def test_the_work_of_a_step_is_what_its_mask_leaves():
    m, k, n = CASE.rows, CASE.in_features, CASE.out_features
    product = 2 * m * k * n

    def share(name):
        return work(CASE, found(name), "both").flops / product

    assert share("linear") == share("mixout-weight-p0.9") == 3
    assert share("mixout-neuron-p0.9") == pytest.approx(2.1)
    assert share("mixout-zero-neuron-p0.9") == pytest.approx(0.3)
    forward = work(CASE, found("mixout-neuron-p0.9"), "forward")
    assert forward.bytes == 4 * (m * k + 2 * n * k + n + m * n)
    assert work(CASE, found("linear"), "forward").bytes == 4 * (m * k + n * k + n + m * n)


def test_the_ceiling_that_takes_longer_binds():
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second={"fp32": 100.0})
    need = work(CASE, found("linear"), "forward")
    assert ceilings.seconds(need, "fp32") == max(need.bytes / 10, need.flops / 100)


def test_saved_bytes_leave_out_parameters():
    o = operands()
    assert saved_bytes(found("linear").make(), o) == o.x.nbytes
    phi_and_mask = o.weight.nbytes + o.weight.numel()
    assert saved_bytes(found("plain-weight-p0.7").make(), o) == o.x.nbytes + phi_and_mask


def test_a_layer_that_raises_fails_alone(monkeypatch):
    def raises(*args, p, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(variants.mk, "mix_linear", raises)
    taken = measure(CASE, [found("linear"), found("mixout-neuron-p0.9")], torch.device("cpu"), 0.0, "eager")
    assert taken.failures == {"mixout-neuron-p0.9": "RuntimeError: no such kernel"}
    assert list(taken.samples) == ["linear"]
    assert all(sample.forward > 0 and sample.backward > 0 for sample in taken.samples["linear"])


def test_a_whole_run_refuses_a_ratio_for_a_wrong_layer_and_fails(tmp_path):
    script = dedent("""
        import sys
        import mixout_kernels as mk

        exact = mk.mix_linear
        mk.mix_linear = lambda *args, p, **options: exact(*args, p=p, **options) * (1.01 if p == 0.9 else 1)
        from benchmarks.layers.__main__ import main
        sys.exit(main())
    """)
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            "--quick",
            "--seconds=0.01",
            "--device=cpu",
            "--only=mixout-neuron|dropout",
            "--output",
            tmp_path,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "mixout-neuron-p0.9 does not match the reference: the error of " in finished.stdout
    (saved,) = tmp_path.glob("*.json")
    entries = json.loads(saved.read_text())["benchmarks"]
    layers = {"linear", "dropout-p0.1", "mixout-neuron-p0.7", "mixout-neuron-p0.9"}
    assert {(e["params"]["variant"], e["params"]["mode"]) for e in entries} == {
        (layer, mode) for layer in layers for mode in ("forward", "backward", "both")
    }
    matches = {e["params"]["variant"]: e["extra_info"]["matches_reference"] for e in entries}
    assert matches == {"linear": None, "dropout-p0.1": None, "mixout-neuron-p0.7": True, "mixout-neuron-p0.9": False}
    assert len({e["stats"]["rounds"] for e in entries}) == 1
