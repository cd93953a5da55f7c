"""A sample is some phases one after another, each timed by the clock of its device.

On a GPU a sample is many launches with one synchronisation, timed by CUDA events: without a synchronisation one times
the launch, and with one per call it costs more than a small kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

Phase = Callable[[], object]
Sampler = Callable[[], tuple[float, ...]]  # the seconds of each phase

WARMUP_CALLS = 3


def sampler(phases: Sequence[Phase], device: torch.device, calls: int = 1) -> Sampler:
    """Time each phase, which does its work ``calls`` times; the seconds are those of one call.

    On a CPU with one thread they are CPU time, which other work on the machine disturbs little.
    """
    return _by_events(phases, calls) if device.type == "cuda" else _by_clock(phases, calls)


def _by_clock(phases: Sequence[Phase], calls: int) -> Sampler:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def sample() -> tuple[float, ...]:
        times = [clock()]
        for phase in phases:
            phase()
            times.append(clock())
        return tuple((end - start) / calls for start, end in pairwise(times))

    return sample


def _by_events(phases: Sequence[Phase], calls: int) -> Sampler:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]

    def sample() -> tuple[float, ...]:
        events[0].record()
        for phase, event in zip(phases, events[1:], strict=True):
            phase()
            event.record()
        events[-1].synchronize()
        return tuple(start.elapsed_time(end) / calls / 1e3 for start, end in pairwise(events))

    return sample


def warm_up(phase: Phase) -> None:
    """Call a phase on a side stream, as CUDA graphs ask for: nothing may be done for the first time in a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            phase()
    torch.cuda.current_stream().wait_stream(side)


def captured(phase: Phase, pool: Any) -> Phase:
    """Capture a warm phase as a CUDA graph in ``pool``, the memory that all graphs share: only one runs at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        phase()
    return graph.replay
