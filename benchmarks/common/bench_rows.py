"""Entries of pytest-benchmark whose rounds are samples that were taken before, interleaved.

pytest-benchmark times one function after another. Its ``timer`` option lets the samples of an interleaved run be played
to it, so its table and its JSON stand on the same numbers as ours.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common.rows import Row


class ReplayClock:
    """A timer under which each round takes as long as a sample that was taken before."""

    __name__ = "interleaved samples"  # what pytest-benchmark writes as the timer

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK)
def test_row(benchmark: BenchmarkFixture, row: Row) -> None:
    if row.failure:
        if not row.required:
            pytest.skip(f"{row.name} cannot run here: {row.failure}")
        pytest.fail(f"{row.name} cannot run: {row.failure}", pytrace=False)
    samples = iter(row.samples)

    def restart() -> None:
        CLOCK.now = 0.0  # the difference of two readings is then the sample, to the last bit

    def advance() -> None:
        CLOCK.now = next(samples)

    benchmark.group = f"{row.case} {row.mode}"
    benchmark.extra_info.update(row.facts, matches_reference=row.matches)
    benchmark.pedantic(advance, setup=restart, rounds=len(row.samples))
    if row.matches is False:
        error = "the error of {largest_error} is {error_over_limit:.3g} x its limit".format(**row.facts)
        pytest.fail(f"{row.name} does not match the reference: {error}", pytrace=False)
