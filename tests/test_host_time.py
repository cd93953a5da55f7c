"""The report of `make host-time` out of rows that are given: what needs a CUDA build of torch is not run here."""

import json
import re
import subprocess

import pytest

from benchmarks.common.rows import Row, Run
from benchmarks.step.workload import WORKLOADS
from tools import host_time

from .conftest import ROOT

BERT = WORKLOADS["bert-large"]
FACTS = {"kind": "dropout", "p": 0.0, "peak_bytes": 3 * 2**20, "allocations": 9, "device_allocations": 0}
LAUNCHES = {"kernels": 1500, "own_kernels": 0, "gemms": 400, "copies": 60, "memsets": 40, "graphs": 0}


def rows(variant, factor, **facts):
    """Four rows of five rounds: 6, 9, 1 and 16 milliseconds at the median."""
    seconds = {"forward": 6e-3, "backward": 9e-3, "optimizer": 1e-3, "step": 16e-3}
    return [
        Row(BERT.name, variant, mode, [factor * s * k for k in (0.9, 1, 1, 1, 5)], facts={**FACTS, **LAUNCHES, **facts})
        for mode, s in seconds.items()
    ]


@pytest.fixture
def run():
    failed = Row(BERT.name, "plain", "step", failure="RuntimeError: no kernel of this kind", facts={"kind": "plain"})
    found = [*rows("dropout", 1), *rows("sampler", 0.75, kind="sampler", p=0.7, own_kernels=120), failed]
    return Run({"device": "a CPU", "torch": "2.14.1"}, "dropout", found)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_says_what_the_rows_do(run):
    text = host_time.markdown(run, BERT, launch=2.0)
    head, _, dropout, sampler = (cells(line) for line in text.splitlines() if line.startswith("|"))
    dropout, sampler = dict(zip(head, dropout, strict=True)), dict(zip(head, sampler, strict=True))
    assert [dropout[name] for name in ("forward", "backward", "optimizer", "ms")] == ["6.0", "9.0", "1.0", "16.0"]
    assert (dropout["x dropout"], sampler["x dropout"]) == ("1.00", "0.75")
    assert dropout["of it launches"] == "4.0"  # 2,000 of 2 us
    assert (sampler["kernels"], sampler["of them ours"], sampler["GEMMs"]) == ("1500", "120", "400")
    assert (sampler["copies, memsets"], sampler["allocations"], sampler["peak MiB"]) == ("100", "9", "3")
    assert "- **Not measured:** bert-large, plain: RuntimeError: no kernel of this kind" in text


def test_it_says_that_no_gpu_was_there(run):
    text = host_time.markdown(run, BERT, launch=2.0)
    assert "**No GPU has run this.**" in text
    assert re.search(r"Not run here: CUDA graphs.*torch\.compile and Triton.*cuDNN", text)
    assert "device a CPU, torch 2.14.1." in text


def test_the_json_has_every_step(run):
    found = json.loads(json.dumps(host_time.report(run, launch=2.0)))
    assert found["machine"] == {"device": "a CPU", "torch": "2.14.1"}
    assert found["launch_us"] == 2.0
    dropout, sampler, plain = found["steps"]
    assert dropout["milliseconds"] == {"forward": 6.0, "backward": 9.0, "optimizer": 1.0, "step": 16.0}
    assert (dropout["rounds"], dropout["ratio"], sampler["ratio"]) == (5, 1.0, pytest.approx(0.75))
    assert (sampler["step"], sampler["p"], sampler["own_kernels"]) == ("sampler", 0.7, 120)
    assert plain["failure"] == "RuntimeError: no kernel of this kind"
    assert "milliseconds" not in plain


def test_its_steps_are_those_of_bench_step_that_it_can_run():
    variants = host_time.eager_variants(BERT)
    assert variants[0].kind == "dropout"  # the baseline
    assert {variant.kind for variant in variants} == {"dropout", "none", "plain", "staged", "layers", "sampler"}
    assert {variant.mode for variant in variants} == {"eager"}
    assert {variant.precision for variant in variants} == {"bfloat16"}
    assert {(v.kind, v.p) for v in variants} >= {(k, p) for k in ("staged", "layers", "sampler") for p in (0.7, 0.9)}


def test_without_the_stand_in_it_says_how_to_start():
    with pytest.raises(SystemExit, match=r"start it by python -m tools\.stand_in COMMAND"):
        host_time.main([])


def test_make_host_time_takes_the_newest_torch():
    """And a folder of its own for the results, whatever the working directory of the script."""
    dry = ["make", "--dry-run", "host-time", "OUT=somewhere", "ARGS=--rounds 3"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    newest = re.search(r"^NEWEST_TORCH := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"tools/host_time.sh {newest} --output {ROOT}/somewhere/host-time --rounds 3" in done.stdout
