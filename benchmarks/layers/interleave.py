"""Interleaved samples, and a clock that lets pytest-benchmark time them.

A promise such as "0.72 x nn.Linear" is a ratio of medians, and on a shared machine it is worth something only if noise
hits both alike: every round takes one sample of each layer, in an order drawn anew. pytest-benchmark times one function
after another, so the rounds run first and their samples are then played to it through its own ``timer`` option: its
table, its JSON and our tables all stand on the same numbers.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from pytest_benchmark.fixture import BenchmarkFixture


class Sample(NamedTuple):
    """Seconds of one call."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


Sampler = Callable[[], Sample]
_T = TypeVar("_T")

WARMUP_ROUNDS = 2


def interleave(samplers: Mapping[str, Callable[[], _T]], rounds: int, order: random.Random) -> dict[str, list[_T]]:
    """``rounds`` samples of each: once a round, in a random order, so that nobody always follows the same one."""
    names = list(samplers)
    samples: dict[str, list[_T]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def interleave_for(
    samplers: Mapping[str, Callable[[], _T]], seconds: float, fewest: int, most: int, seed: int = 0
) -> dict[str, list[_T]]:
    """As many rounds as fit into ``seconds``, within limits; the warm-up rounds that tell are not among the samples."""
    order = random.Random(seed)
    started = time.perf_counter()
    interleave(samplers, WARMUP_ROUNDS, order)
    round_seconds = (time.perf_counter() - started) / WARMUP_ROUNDS
    return interleave(samplers, min(most, max(fewest, int(seconds / round_seconds))), order)


class ReplayClock:
    """A timer for pytest-benchmark under which each round takes as long as a sample that was taken before."""

    __name__ = "interleaved samples"  # what pytest-benchmark writes as the timer

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, benchmark: BenchmarkFixture, samples: Sequence[float]) -> None:
        remaining = iter(samples)

        def restart() -> None:
            self.now = 0.0  # the difference of two readings is then the sample, to the last bit

        def advance() -> None:
            self.now = next(remaining)

        benchmark.pedantic(advance, setup=restart, rounds=len(samples))
