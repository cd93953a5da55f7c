"""The layer benchmark: the reference check, the roofline's arithmetic, its report, and one whole run."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import mixout_kernels as mk
from benchmarks.common.rows import Row, Run
from benchmarks.layers import layers
from benchmarks.layers.agreement import Expected
from benchmarks.layers.cases import Case, Operands, cases_for
from benchmarks.layers.layers import layers_for
from benchmarks.layers.measurement import Phases, measure
from benchmarks.layers.plot import draw
from benchmarks.layers.roofline import Ceilings, work
from benchmarks.layers.table import markdown
from benchmarks.layers.targets import outcomes

ROOT = Path(__file__).parents[2]
CASE = Case(48, 64, 80, "fp32")
CEILINGS = Ceilings(bytes_per_second=10.0, flops_per_second={"fp32": 100.0})
MACHINE = {"device": "Machine X", "threads": 2, "torch": "2.13.0", "commit": "0123456789ab"}
A, B = "2048x768x768-fp32", "512x384x384-fp32"


def operands(case=CASE):
    return Operands.random(case, torch.device("cpu"), torch.Generator().manual_seed(0))


def found(name, case=CASE):
    return next(layer for layer in layers_for(case, "cpu") if layer.name == name)


def verdict_of(layer, case=CASE):
    return Expected(operands(case), layer.mix).check(layer)


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_this_packages_layers_match_the_reference(dtype_name):
    case = Case(48, 64, 80, dtype_name)
    ours = [layer for layer in layers_for(case, "cpu") if layer.ours]
    assert len(ours) >= 10
    assert [layer.name for layer in ours if not verdict_of(layer, case).matches] == []


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

    monkeypatch.setattr(layers.mk, "mix_linear", faulty)
    verdict = verdict_of(found("mixout-neuron-p0.9"))
    assert not verdict.matches
    if fault in ("y", "dx", "dw", "db"):
        assert verdict.where == fault


def test_the_work_of_a_step_is_what_its_mask_leaves():
    m, k, n = CASE.rows, CASE.in_features, CASE.out_features
    gemm = 2 * m * k * n

    def share(name):
        return work(CASE, found(name), "both").flops / gemm

    assert share("linear") == share("mixout-weight-p0.9") == 3
    assert share("mixout-neuron-p0.9") == share("graddrop-neuron-p0.9") == pytest.approx(2.1)
    assert share("mixout-zero-neuron-p0.9") == pytest.approx(0.3)
    forward = work(CASE, found("mixout-neuron-p0.9"), "forward")
    assert forward.bytes == 4 * (m * k + 2 * n * k + n + m * n)
    for one_weight in ("linear", "graddrop-neuron-p0.9"):
        assert work(CASE, found(one_weight), "forward").bytes == 4 * (m * k + n * k + n + m * n)


def test_the_ceiling_that_takes_longer_binds():
    need = work(CASE, found("linear"), "forward")
    assert CEILINGS.seconds(need, "fp32") == max(need.bytes / 10, need.flops / 100)


def test_saved_bytes_leave_out_parameters():
    o = operands()

    def saved(name):
        return Phases(found(name).make(), [o], has_backward=True).saved_bytes()

    assert saved("linear") == o.x.nbytes
    assert saved("plain-weight-p0.7") == o.x.nbytes + o.weight.nbytes + o.weight.numel()  # Phi and the mask


def test_the_default_shapes_are_few_and_have_the_targets():
    default = {case.name for case in cases_for("cuda", quick=False, full=False)}
    assert len(default) == 12
    assert {"4096x1024x1024-bf16", "8192x4096x4096-bf16", "64x4096x4096-bf16", "512x1024x1024-bf16"} < default
    assert len(cases_for("cuda", quick=False, full=True)) == 62


@pytest.mark.parametrize("when", ["checked", "sampled"])
def test_a_layer_that_raises_fails_alone(monkeypatch, when):
    exact, calls = mk.mix_linear, []

    def raises(*args, **options):
        calls.append(None)
        if when == "checked" or len(calls) > 4:
            raise RuntimeError("no such kernel")
        return exact(*args, **options)

    monkeypatch.setattr(layers.mk, "mix_linear", raises)
    pair = [found("linear"), found("mixout-neuron-p0.9")]
    rows = measure(CASE, pair, torch.device("cpu"), 0.0, "eager", CEILINGS)
    assert [row.mode for row in rows] == ["forward", "backward", "both"] * 2
    assert {row.failure for row in rows[3:]} == {"RuntimeError: no such kernel"}
    assert not any(row.samples for row in rows[3:])
    for forward, backward, both in zip(*(row.samples for row in rows[:3]), strict=True):
        assert min(forward, backward) > 0
        assert both == forward + backward


def layer(case, variant, forward, backward, matches=None, roofline_share=0.5):
    rates = {"gflop_per_second": 2000.0, "gbyte_per_second": 3.0, "roofline_share": roofline_share}
    times = {"forward": forward, "backward": backward, "both": forward + backward}
    return [
        Row(case, variant, mode, [seconds], matches=matches, facts={**rates, "saved_bytes": 5 << 20})
        for mode, seconds in times.items()
    ]


def cpu_run():
    return Run(
        MACHINE,
        "linear",
        [
            *layer(A, "linear", 0.010, 0.030),
            *layer(A, "dropout-p0.1", 0.020, 0.030),
            *layer(A, "mixout-neuron-p0.9", 0.011, 0.017, matches=True),
            *layer(B, "linear", 0.001, 0.003),
            *layer(B, "mixout-neuron-p0.9", 0.0001, 0.0001, matches=False),
        ],
    )


def cells(text, first_cell):
    lines = [line for line in text.splitlines() if line.startswith(f"| {first_cell} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_gives_times_and_ratios_of_medians():
    summary, in_a, in_b = cells(markdown(cpu_run(), "cpu"), "mixout-neuron-p0.9")
    assert summary == ["mixout-neuron-p0.9", "0.70", "**wrong**"]
    assert in_a[:9] == ["mixout-neuron-p0.9", "yes", "11", "1.10", "17", "0.57", "28", "0.70", "0.56"]
    assert in_a[9:] == ["2000", "3", "50%", "5.0"]
    # However fast a layer is, there is no ratio for a wrong result.
    assert in_b[1] == "**NO**"
    assert [in_b[i] for i in (3, 5, 7, 8)] == ["**wrong**"] * 4


def judged(run, device="cpu"):
    return {(o.case, o.target.variant, o.target.baseline): (o.ratio, o.reached) for o in outcomes(run, device)}


def test_targets_are_judged_by_the_run():
    assert judged(cpu_run()) == {
        (A, "mixout-neuron-p0.9", "linear"): (pytest.approx(0.7), True),
        (A, "mixout-neuron-p0.9", "dropout-p0.1"): (pytest.approx(0.56), True),
        (B, "mixout-neuron-p0.9", "linear"): (None, False),
    }


def test_a_target_is_missed_above_its_limit():
    rows = layer(A, "linear", 0.5, 0.5) + layer(A, "mixout-neuron-p0.9", 0.5, 0.2201, matches=True)
    assert [outcome.reached for outcome in outcomes(Run(MACHINE, "linear", rows), "cpu")] == [False]


def test_gpu_targets_everywhere_and_of_the_roofline():
    fast, slow, small = "4096x1024x1024-bf16", "16x768x768-bf16", "64x4096x4096-bf16"
    rows = []
    for case, compiled in ((fast, 2.0), (slow, 1.0)):
        rows += layer(case, "linear", 0.5, 0.5)
        rows += layer(case, "compiled-neuron-p0.7", compiled / 2, compiled / 2)
        rows += layer(case, "mixout-neuron-p0.7", 0.45, 0.45, matches=True)
    rows += layer(small, "linear", 1.0, 1.0)
    rows += layer(small, "mixout-cuda-fused-neuron-p0.9", 0.5, 0.5, matches=True, roofline_share=0.8)[:1]
    found = judged(Run(MACHINE, "linear", rows), "cuda")
    assert found[slow, "mixout-neuron-p0.7", "compiled-neuron-p0.7"] == (pytest.approx(0.9), False)
    assert found[small, "mixout-cuda-fused-neuron-p0.9", "roofline"] == (pytest.approx(1.25), False)
    assert found[fast, "mixout-neuron-p0.7", "linear"] == (pytest.approx(0.9), True)


def test_a_noisy_run_says_so():
    rows = layer(A, "linear", 0.5, 0.5)
    assert "Too noisy" not in markdown(Run(MACHINE, "linear", rows), "cpu")
    rows[-1].samples = [0.5, 1.0, 1.5]
    assert "Too noisy" in markdown(Run(MACHINE, "linear", rows), "cpu")


@pytest.mark.parametrize("shown_for", ["cpu", "cuda"])
def test_the_plot_shows_the_layers(shown_for):
    figure = draw(cpu_run(), shown_for)
    figure.canvas.draw()
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"Dropout(0.1) + nn.Linear", "mixout_kernels, neuron, p = 0.9"}


def test_a_whole_run_refuses_a_ratio_for_a_wrong_layer_and_fails(tmp_path):
    script = dedent("""
        import sys
        import mixout_kernels as mk

        exact = mk.mix_linear
        mk.mix_linear = lambda *args, p, **options: exact(*args, p=p, **options) * (1.01 if p == 0.9 else 1)
        from benchmarks.layers.__main__ import main
        sys.exit(main())
    """)
    options = ["--quick", "--seconds=0.01", "--device=cpu", "--only=^mixout-neuron|dropout", "--output", tmp_path]
    finished = subprocess.run(
        [sys.executable, "-c", script, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "mixout-neuron-p0.9-forward does not match the reference: the error of " in finished.stdout
    (stem,) = {path.stem for path in tmp_path.iterdir()}
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".png", ".json"}
    with (tmp_path / f"{stem}.csv").open() as file:
        lines = list(csv.DictReader(file))
    names = ("linear", "dropout-p0.1", "mixout-neuron-p0.7", "mixout-neuron-p0.9")
    assert [(line["variant"], line["mode"]) for line in lines] == [
        (name, mode) for name in names for mode in ("forward", "backward", "both")
    ]
    matches = {line["variant"]: line["matches_reference"] for line in lines}
    assert matches == dict(zip(names, ("", "", "True", "False"), strict=True))
    assert {line["ratio"] != "" for line in lines if line["variant"] == "mixout-neuron-p0.9"} == {False}
    assert len({line["rounds"] for line in lines}) == 1
    assert "**wrong**" in (tmp_path / f"{stem}.md").read_text()
