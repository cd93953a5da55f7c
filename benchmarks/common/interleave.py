"""Interleaved samples.

A promise such as "0.72 x nn.Linear" is a ratio of medians, and on a shared machine it is worth something only if noise
hits both alike: every round takes one sample of each variant, in an order drawn anew.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

_T = TypeVar("_T")

WARMUP_ROUNDS = 2


def interleave(
    samplers: Mapping[str, Callable[[], _T]], rounds: int, order: random.Random | None = None
) -> dict[str, list[_T]]:
    """Take ``rounds`` samples of each: once a round, in a random order, so that nobody always follows the same one."""
    order = order or random.Random(0)
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
    samplers: Mapping[str, Callable[[], _T]], seconds: float, fewest: int, most: int
) -> dict[str, list[_T]]:
    """Take as many rounds as fit into ``seconds``, within limits, after two warm-up rounds that tell how many do."""
    order = random.Random(0)
    started = time.perf_counter()
    interleave(samplers, WARMUP_ROUNDS, order)
    round_seconds = (time.perf_counter() - started) / WARMUP_ROUNDS
    return interleave(samplers, min(most, max(fewest, int(seconds / round_seconds))), order)
