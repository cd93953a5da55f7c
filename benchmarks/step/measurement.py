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

from .agreement import matches_reference, replay_matches_reference
from .memory import peak_bytes
from .training import WARMUP_STEPS, Captured, Training
from .variants import Variant
from .workload import WORKLOADS

# On a GPU one sample has several steps, so that the host may run ahead as it does in training. A step that waits for
# the device is otherwise as long as what the host needs for its launches, which are thousands.
STEPS_ON_GPU = 5


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
    mode: str = "eager"

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
    """All variants are in memory together and take their steps in turn: every round one sample of each.

    A CUDA graph comes with its eager variant, whose weights it trains.
    """
    peaks: dict[Variant, int] = {}
    on_gpu = WORKLOADS[workload].device == "cuda"
    if on_gpu:
        _load_libraries()
    elif with_memory:
        say(f"peak memory of {len(variants)} variants")
        peaks = peak_bytes(workload, variants)
    trainings: dict[Variant, Training] = {}
    found: dict[Variant, Measurement] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for variant in sorted(variants, key=_turn):
        say(f"{variant.name}: warm-up")
        _release(on_gpu)
        if variant.mode == "graph":
            captured, found[variant] = _captured(variant, trainings[variant.eager])
            samplers[variant.name] = _gpu_sampler(captured.step, captured.training)
            continue
        training, found[variant] = _trained(workload, variant)
        found[variant].peak_bytes = peaks.get(variant, found[variant].peak_bytes)
        trainings[variant] = training
        samplers[variant.name] = _gpu_sampler(training.step, training) if on_gpu else _cpu_sampler(training)
    _release(on_gpu)
    say(f"{rounds} rounds of {len(found)} variants")
    samples = interleave({variant.name: samplers[variant.name] for variant in variants}, rounds, random.Random(0))
    for measurement in found.values():
        measurement.milliseconds = samples[measurement.variant]
    return [found[variant] for variant in variants]


def _turn(variant: Variant) -> int:
    """Ours first: their check in float64 wants to be alone with few others on the GPU. CUDA graphs last.

    A profiler that starts after a capture may crash (CUPTI, see torch/profiler/profiler.py), and the launches of a step
    are counted by one.
    """
    return 2 if variant.mode == "graph" else 0 if variant.ours else 1


def _load_libraries() -> None:
    """cuBLAS allocates its workspaces at the first product of each thread: not in the memory of the first variant."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer = torch.nn.Linear(64, 64, device="cuda", dtype=dtype)
        layer(torch.ones(64, 64, device="cuda", dtype=dtype)).sum().backward()
    torch.cuda.synchronize()


def _release(on_gpu: bool) -> None:
    """The copies that a check has made are cycles, and would stay for all rounds: ``interleave`` turns gc off."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def _trained(name: str, variant: Variant) -> tuple[Training, Measurement]:
    workload = WORKLOADS[name]
    on_gpu = workload.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training = Training(workload, variant)
    start = time.perf_counter()
    for _ in range(WARMUP_STEPS):
        training.step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = launches = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # a compiler tries its kernels in the first step, on memory of its own
        launches = _launches(training)
        peak = torch.cuda.max_memory_allocated() - before
        training.optimizer.zero_grad()
    measurement = _described(variant, training)
    measurement.warmup_seconds, measurement.peak_bytes, measurement.launches = seconds, peak, launches
    if variant.ours:
        measurement.matches_reference = matches_reference(training)
    return training, measurement


def _captured(variant: Variant, training: Training) -> tuple[Captured, Measurement]:
    start = time.perf_counter()
    captured = Captured(training)
    seconds = time.perf_counter() - start
    measurement = _described(variant, training)
    measurement.warmup_seconds = seconds
    if variant.ours:
        measurement.matches_reference = replay_matches_reference(captured)
    return captured, measurement


def _described(variant: Variant, training: Training) -> Measurement:
    return Measurement(
        variant=variant.name,
        kind=variant.kind,
        p=variant.p,
        matches_reference=None,
        saved_bytes=training.saved_bytes(),
        target_bytes=training.target_bytes,
        mixed_bytes=training.mixed_bytes,
        mode=variant.mode,
    )


def _cpu_sampler(training: Training) -> Callable[[], float]:
    """One step, in milliseconds."""

    def sample() -> float:
        start = time.perf_counter()
        training.step()
        return (time.perf_counter() - start) * 1e3

    return sample


def _gpu_sampler(step: Callable[[], None], training: Training) -> Callable[[], float]:
    """The mean of some steps, in milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        for _ in range(STEPS_ON_GPU):
            step()
        end.record()
        end.synchronize()
        training.optimizer.zero_grad()  # only one variant at a time holds gradients: 1.3 GB of BERT-large's
        return start.elapsed_time(end) / STEPS_ON_GPU

    return sample


def _launches(training: Training) -> int:
    """Kernels that one step launches: calls of cudaLaunchKernel, cuLaunchKernel and their relatives."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        training.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
