"""The common part of the benchmarks: verdicts, memory, rows and their report."""

import csv
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from benchmarks.common import machine, memory, report
from benchmarks.common.agreement import Verdict, compare, compare_model
from benchmarks.common.rows import Row, Run, attempt, guarded

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "Machine X", "threads": 2, "torch": "2.13.0", "commit": "0123456789ab"}


def tensors(*scales):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1000, dtype=torch.float64, generator=generator)
    return [{"a": truth * scale} for scale in scales]


@pytest.mark.parametrize(
    ("ours", "reference", "worst"),
    [
        (1 + 2e-3, 1 + 1e-3, 1.0),  # twice the reference's error is the limit
        (1 + 4e-3, 1 + 1e-3, 2.0),
        (1 + 4 * 2**-23, 1, 1.0),  # with a reference that is exact, four roundings of float32 are
        (1, 1, 0.0),
        (float("nan"), 1, float("inf")),
    ],
)
def test_the_limit_of_an_error(ours, reference, worst):
    verdict = compare(*tensors(ours, reference, 1))
    assert verdict.worst == pytest.approx(worst, rel=1e-3)
    assert verdict.where == "a"


def test_a_parameter_may_err_where_the_model_may_not():
    big, small = torch.ones(10_000, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    truth = {"big": big, "small": small}
    reference = {"big": big * (1 + 1e-3), "small": small * (1 + 1e-3)}
    assert compare_model({"big": big * (1 + 1e-3), "small": small * (1 + 8e-3)}, reference, truth).matches
    assert not compare_model({"big": big * (1 + 8e-3), "small": small}, reference, truth).matches
    unlucky = compare_model({"big": big, "small": small * 1.1}, reference, truth)
    assert (unlucky.matches, unlucky.where) == (False, "small")


class Witness:
    """A hook of a node, which lives as long as the node does."""

    def __call__(self, *arguments):
        return None


@pytest.mark.parametrize("function", [torch.exp, torch.nn.functional.gelu])
def test_counting_saved_bytes_frees_the_graph(function):
    """exp saves its output: a hook that hands it back as it is would let the node own itself, beyond gc's sight."""
    x = torch.randn(1000, requires_grad=True)
    witnesses = []

    def forward():
        y = function(x)
        witness = Witness()
        y.grad_fn.register_hook(witness)
        witnesses.append(weakref.ref(witness))
        return y

    gc.disable()
    try:
        assert memory.saved_bytes(forward, known=()) == x.nbytes
        assert witnesses[0]() is None
    finally:
        gc.enable()


def test_known_tensors_are_not_counted():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(30, 20, requires_grad=True)
    assert memory.saved_bytes(lambda: x @ w.t(), known=(w,)) == x.nbytes
    assert memory.saved_bytes(lambda: x @ w.t(), known=(x, w)) == 0


def test_peak_of_a_fresh_process():
    size = 64 << 20
    peak = memory.peak_bytes(bytearray, size)
    assert abs(peak - size) < 16 << 20
    assert memory.peak_bytes(os._exit, 1) is None
    with pytest.raises(ValueError, match="invalid literal"):
        memory.peak_bytes(int, "no number")


def row(variant, *samples, case="a", mode="both", **options):
    return Row(case, variant, mode, samples=samples, **options)


def test_ratios_are_of_medians_in_the_same_group():
    slow, fast = row("linear", 10, 12, 14), row("ours", 6, 3, 9)
    later, again = row("other", 5, group=1), row("linear", 20, group=1)
    run = Run(MACHINE, "linear", [slow, fast, later, again])
    assert (run.ratio(slow), run.ratio(fast), run.ratio(later)) == (1, 0.5, 0.25)
    assert run.ratio(slow, "ours") == 2
    assert run.ratio(slow, "other") is None  # never in the same rounds
    assert run.find("a", "linear", "both") is slow


def test_a_wrong_result_gets_no_ratio():
    wrong = row("ours", 1)
    wrong.judge(Verdict(1.5, "dw"))
    run = Run(MACHINE, "linear", [row("linear", 10), wrong])
    assert run.ratio(wrong) is None
    assert report.ratio_cell(run, wrong) == "**wrong**"
    assert report.reference_cell(wrong) == "**NO**"
    assert wrong.facts == {"error_over_limit": 1.5, "largest_error": "dw"}


def test_an_error_is_the_result_of_its_rows_alone():
    rows = [Row("a", "x", "forward"), Row("a", "x", "backward")]
    calls = []

    def sample():
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError("no more")
        return 1.0

    keep_on = guarded(rows, sample)
    assert [keep_on() for _ in range(4)] == [1.0, None, None, None]
    assert len(calls) == 2
    assert {r.failure for r in rows} == {"MemoryError: no more"}
    other = Row("a", "y", "forward")
    with attempt([other]):
        pass
    assert other.failure is None
    run = Run(MACHINE, "y", [*rows, other])
    assert report.failure_lines(run) == "- **Not measured:** a, x: MemoryError: no more"


def test_the_csv_has_a_line_for_every_row(tmp_path):
    failed = Row("a", "broken", "both", failure="RuntimeError: no such kernel")
    run = Run(MACHINE, "linear", [row("linear", 1, 2, 3), row("ours", 1.0, facts={"p": 0.9}, matches=True), failed])
    run.write_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open() as file:
        linear, ours, broken = csv.DictReader(file)
    assert {name: linear[name] for name in MACHINE} == {name: str(value) for name, value in MACHINE.items()}
    assert [linear[name] for name in ("q1_seconds", "median_seconds", "q3_seconds", "rounds")] == [
        "1.5",
        "2",
        "2.5",
        "3",
    ]
    assert [ours[name] for name in ("p", "matches_reference", "ratio")] == ["0.9", "True", "0.5"]
    assert (broken["median_seconds"], broken["failure"]) == ("", "RuntimeError: no such kernel")


def test_tables_are_aligned():
    assert report.table(["layer", "x"], [["a", "1.25"], ["nn.Linear", "1"]]).splitlines() == [
        "| layer     |    x |",
        "| --------- | ---: |",
        "| a         | 1.25 |",
        "| nn.Linear |    1 |",
    ]


def test_pytest_benchmark_reports_the_samples_to_the_last_bit_and_fails_for_wrong_ones(tmp_path):
    samples = [0.1, 3e-7, 12.5, 0.30000000000000004, 7e-9]
    script = dedent(f"""
        import sys
        from pathlib import Path
        from benchmarks.common.agreement import Verdict
        from benchmarks.common.rows import Row, Run

        rows = [Row("a", name, "both", samples={samples}) for name in ("right", "wrong")]
        rows[1].judge(Verdict(2.5, "dw"))
        rows += [Row("a", "optional", "both", failure="no compiler", required=False)]
        rows += [Row("a", "broken", "both", failure="RuntimeError: no such kernel")]
        sys.exit(Run({{}}, "right", rows).play(Path("out.json")))
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "2 failed, 1 passed, 1 skipped" in finished.stdout
    assert "a-wrong-both does not match the reference: the error of dw is 2.5 x its limit" in finished.stdout
    assert "a-broken-both cannot run: RuntimeError: no such kernel" in finished.stdout
    entries = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert [entry["stats"]["data"] for entry in entries] == [samples, samples]
    assert [entry["stats"]["median"] for entry in entries] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"brand_raw": "AMD EPYC", "family": 25, "model": 17}, "AMD EPYC (family 25, model 17)"),
        ({"brand_raw": "AMD EPYC 9654 96-Core", "family": 25, "model": 17}, "AMD EPYC 9654 96-Core"),
        ({"brand_raw": "Apple M"}, "Apple M"),
    ],
)
def test_two_generations_of_a_cpu_have_two_names(monkeypatch, found, name):
    monkeypatch.setattr(machine.cpuinfo, "get_cpu_info", lambda: found)
    assert machine.describe()["device"] == name
