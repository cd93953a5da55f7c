"""The interleaved rounds, and that pytest-benchmark reports their samples and no others."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from benchmarks.layers.interleave import WARMUP_ROUNDS, Sample, interleave, interleave_for

ROOT = Path(__file__).parents[2]


def samplers_that_note(calls: list[str], names: str) -> dict:
    def sampler(name: str):
        return lambda: (calls.append(name), len(calls))[1]

    return {name: sampler(name) for name in names}


def test_every_round_takes_each_layer_once_in_varying_order():
    calls: list[str] = []
    samples = interleave(samplers_that_note(calls, "abcd"), 20, random.Random(1))
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert all(sorted(taken) == list("abcd") for taken in rounds)
    assert len({tuple(taken) for taken in rounds}) > 5
    # The k-th call returned k: sample i of a layer is the one it gave in round i.
    assert all(rounds[i][(sample - 1) % 4] == name for name in "abcd" for i, sample in enumerate(samples[name]))


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (1e9, 7)])
def test_the_time_budget_has_limits_and_warm_up_is_left_out(seconds, rounds):
    calls: list[str] = []
    samples = interleave_for(samplers_that_note(calls, "ab"), seconds, fewest=3, most=7)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": rounds, "b": rounds}
    assert min(samples["a"] + samples["b"]) == 2 * WARMUP_ROUNDS + 1
    assert len(calls) == 2 * (WARMUP_ROUNDS + rounds)


def test_a_sample_adds_up():
    assert Sample(forward=0.25, backward=0.5).both == 0.75


def test_pytest_benchmark_reports_the_played_samples_to_the_last_bit(tmp_path):
    samples = [0.1, 3e-7, 12.5, 0.30000000000000004, 7e-9]
    (tmp_path / "test_replay.py").write_text(
        dedent(f"""
        import pytest
        from benchmarks.layers.interleave import ReplayClock

        clock = ReplayClock()

        @pytest.mark.benchmark(timer=clock)
        @pytest.mark.parametrize("factor", [1.0, 2.0])
        def test_replay(benchmark, factor):
            clock.play(benchmark, [factor * sample for sample in {samples}])
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=out.json"]
    finished = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", ".", "test_replay.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    stats = [entry["stats"] for entry in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert [s["data"] for s in stats] == [samples, [2 * sample for sample in samples]]
    assert [s["median"] for s in stats] == [0.1, 0.2]
