"""Times, memory and launches of every variant, side by side."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.layers.interleave import interleave

from .agreement import matches_reference
from .memory import peak_bytes
from .training import Training
from .variants import Variant
from .workload import WORKLOADS

# The first step makes Adam's state and mixes layer by layer, the second runs in the memory that stays.
WARMUP_STEPS = 3


@dataclass
class Measurement:
    """Of one variant. None: not measured here."""

    variant: str
    kind: str
    p: float
    matches_reference: bool | None
    saved_bytes: int
    target_bytes: int
    mixed_bytes: int
    peak_bytes: int | None = None
    launches: int | None = None
    warmup_seconds: float = 0.0
    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.milliseconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return first, third


def measure(
    workload: str, variants: Sequence[Variant], rounds: int, with_memory: bool, say: Callable[[str], None]
) -> list[Measurement]:
    """All variants are in memory together and take their steps in turn: every round one step of each."""
    peaks: dict[Variant, int] = {}
    if with_memory and WORKLOADS[workload].device == "cpu":
        say(f"peak memory of {len(variants)} variants")
        peaks = peak_bytes(workload, variants)
    found: list[Measurement] = []
    samplers: dict[str, Callable[[], float]] = {}
    for variant in variants:
        say(f"{variant.name}: warm-up")
        training, measurement = _prepared(workload, variant)
        measurement.peak_bytes = peaks.get(variant, measurement.peak_bytes)
        found.append(measurement)
        samplers[variant.name] = _sampler(training)
    say(f"{rounds} rounds of {len(found)} steps")
    samples = interleave(samplers, rounds, random.Random(0))
    for measurement in found:
        measurement.milliseconds = samples[measurement.variant]
    return found


def _prepared(name: str, variant: Variant) -> tuple[Training, Measurement]:
    workload = WORKLOADS[name]
    on_gpu = workload.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training = Training(workload, variant)
    start = time.perf_counter()
    for _ in range(WARMUP_STEPS):
        training.step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    measurement = Measurement(
        variant=variant.name,
        kind=variant.kind,
        p=variant.p,
        matches_reference=None,
        saved_bytes=0,
        target_bytes=training.target_bytes,
        mixed_bytes=training.mixed_bytes,
        warmup_seconds=seconds,
    )
    if on_gpu:
        measurement.peak_bytes = torch.cuda.max_memory_allocated() - before
        measurement.launches = _launches(training)
    measurement.saved_bytes = training.saved_bytes()
    if variant.ours:
        measurement.matches_reference = matches_reference(training)
    return training, measurement


def _sampler(training: Training) -> Callable[[], float]:
    """One step, in milliseconds."""
    if training.workload.device == "cpu":

        def sample() -> float:
            start = time.perf_counter()
            training.step()
            return (time.perf_counter() - start) * 1e3

        return sample
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample_on_gpu() -> float:
        start.record()
        training.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return sample_on_gpu


def _launches(training: Training) -> int:
    """Kernels that one step launches: calls of cudaLaunchKernel, cuLaunchKernel and their relatives."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        training.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
