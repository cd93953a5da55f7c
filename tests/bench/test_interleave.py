"""The interleaved rounds."""

import random

import pytest

from benchmarks.common.interleave import WARMUP_ROUNDS, interleave, interleave_for


def samplers_that_note(calls: list[str], names: str) -> dict:
    def sampler(name: str):
        return lambda: (calls.append(name), len(calls))[1]

    return {name: sampler(name) for name in names}


def test_every_round_takes_each_variant_once_in_varying_order():
    calls: list[str] = []
    samples = interleave(samplers_that_note(calls, "abcd"), 20, random.Random(1))
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert all(sorted(taken) == list("abcd") for taken in rounds)
    assert len({tuple(taken) for taken in rounds}) > 5
    # The k-th call returned k: sample i of a variant is the one it gave in round i.
    assert all(rounds[i][(sample - 1) % 4] == name for name in "abcd" for i, sample in enumerate(samples[name]))


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (1e9, 7)])
def test_the_time_budget_has_limits_and_warm_up_is_left_out(seconds, rounds):
    calls: list[str] = []
    samples = interleave_for(samplers_that_note(calls, "ab"), seconds, fewest=3, most=7)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": rounds, "b": rounds}
    assert min(samples["a"] + samples["b"]) == 2 * WARMUP_ROUNDS + 1
    assert len(calls) == 2 * (WARMUP_ROUNDS + rounds)
