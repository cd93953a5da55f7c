"""Times, memory and launches of every variant, side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common import clocks
from benchmarks.common.interleave import interleave
from benchmarks.common.memory import peak_bytes
from benchmarks.common.rows import Row, attempt, guarded

from .agreement import check, check_replay
from .training import WARMUP_STEPS, Captured, Training, train_briefly
from .variants import Variant
from .workload import Workload

# On a GPU one sample has several steps, so that the host may run ahead as it does in training. A step that waits for
# the device is otherwise as long as what the host needs for its launches, which are thousands.
STEPS_ON_GPU = 5
# BERT-large has 5 GB of weights, targets and Adam's moments in each, and a graph's pool of activations beside them.
MODELS_ON_GPU = 4


def measure(
    workload: Workload, variants: Sequence[Variant], rounds: int, with_memory: bool, say: Callable[[str], None]
) -> list[Row]:
    """Take the steps of all variants in turn: every round one sample of each. The first variant is the baseline.

    On a GPU only a few models fit, so the variants are measured in groups, the baselines in each of them. What a
    variant raises is its own result.
    """
    on_gpu = workload.device == "cuda"
    if on_gpu:
        _load_libraries()
    found: dict[tuple[Variant, int], Row] = {}
    for number, group in enumerate(groups(variants, MODELS_ON_GPU if on_gpu else len(variants))):
        rows = {variant: _row(workload, variant, number) for variant in group}
        if with_memory and not on_gpu:
            _measure_peaks(workload, rows, say)
        _measure_group(workload, rows, rounds, say)
        found |= {(variant, number): row for variant, row in rows.items()}
        _release(on_gpu)
    order = {variant: place for place, variant in enumerate(variants)}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], key[1]))]


def groups(variants: Sequence[Variant], most: int) -> list[list[Variant]]:
    """Split them into groups of at most ``most`` models, each with the steps that its ratios are taken to."""
    found: list[list[Variant]] = [[]]
    for variant in sorted(variants, key=lambda v: variants.index(v.trained)):  # a graph beside its model
        if any(variant in group for group in found):
            continue
        baselines = [v for v in (variants[0], variant.dropout_alike) if v in variants]
        wanted = dict.fromkeys([*baselines, variant.trained, variant])
        together = dict.fromkeys([*found[-1], *wanted])
        fits = len({v.trained for v in together}) <= most
        found[-1:] = [list(together)] if fits or not found[-1] else [found[-1], list(wanted)]
    return found


def _measure_group(workload: Workload, rows: dict[Variant, Row], rounds: int, say: Callable[[str], None]) -> None:
    on_gpu = workload.device == "cuda"
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    trainings: dict[Variant, Training] = {}
    samplers: dict[str, Callable[[], float | None]] = {}
    for variant in sorted(rows, key=_turn):
        say(f"{variant.name}: warm-up")
        _release(on_gpu)
        row = rows[variant]
        if variant.mode == "graph" and variant.trained not in trainings:
            row.failure = "its eager step, whose weights it trains, failed"
            continue
        with attempt([row]):
            if variant.mode == "graph":
                step, training = _captured(trainings[variant.trained], pool, row).step, trainings[variant.trained]
            else:
                training = trainings[variant] = _trained(workload, variant, row)
                step = training.step
            samplers[variant.name] = guarded([row], _sampler(step, training))
    _release(on_gpu)
    say(f"{rounds} rounds of {len(samplers)} variants")
    samples = interleave(samplers, rounds)
    for variant, row in rows.items():
        if row.failure is None:
            row.samples = samples[variant.name]


def _row(workload: Workload, variant: Variant, group: int) -> Row:
    return Row(workload.name, variant.name, "step", group=group, facts=variant.facts())


def _measure_peaks(workload: Workload, rows: dict[Variant, Row], say: Callable[[str], None]) -> None:
    """Measure the peak memory of training on a CPU, each variant by itself in a fresh process.

    Not of variants that compile code, whose compiler would be most of what is measured.
    """
    for variant, row in rows.items():
        if variant.mode == "eager":
            say(f"{variant.name}: peak memory")
            with attempt([row]):
                row.facts["peak_bytes"] = peak_bytes(train_briefly, workload.name, variant)


def _turn(variant: Variant) -> int:
    """Ours first: their check in float64 wants to be alone with few others on the GPU. CUDA graphs last.

    A profiler that starts after a capture may crash (CUPTI, see torch/profiler/profiler.py), and the launches of a step
    are counted by one.
    """
    return 2 if variant.mode == "graph" else 0 if variant.ours else 1


def _load_libraries() -> None:
    """Let cuBLAS allocate its workspaces, which it does at the first GEMM: not in the memory of the first variant."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer = torch.nn.Linear(64, 64, device="cuda", dtype=dtype)
        layer(torch.ones(64, 64, device="cuda", dtype=dtype)).sum().backward()
    torch.cuda.synchronize()


def _release(on_gpu: bool) -> None:
    """Free the copies that a check has made: they are cycles, and would stay through all rounds, where gc is off."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def _trained(workload: Workload, variant: Variant, row: Row) -> Training:
    on_gpu = workload.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training = Training(workload, variant)
    start = time.perf_counter()
    training.steps(WARMUP_STEPS)
    if on_gpu:
        torch.cuda.synchronize()
    row.facts["warmup_seconds"] = time.perf_counter() - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # a compiler tries its kernels in the first step, on memory of its own
        row.facts["launches"] = _launches(training)
        row.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        training.optimizer.zero_grad()
    _describe_memory(training, row)
    if variant.ours:
        row.judge(check(training))
    return training


def _captured(training: Training, pool: Any, row: Row) -> Captured:
    start = time.perf_counter()
    captured = Captured(training, pool)
    row.facts["warmup_seconds"] = time.perf_counter() - start
    _describe_memory(training, row)
    if training.variant.ours:
        row.judge(check_replay(captured))
    captured.release()
    return captured


def _describe_memory(training: Training, row: Row) -> None:
    row.facts["saved_bytes"] = training.saved_bytes()
    row.facts["target_bytes"] = training.target_bytes
    row.facts["mixed_bytes"] = training.mixed_bytes


def _sampler(step: Callable[[], object], training: Training) -> Callable[[], float]:
    """Sample the seconds of one step: on a GPU the mean of a few."""
    on_gpu = training.workload.device == "cuda"
    steps = STEPS_ON_GPU if on_gpu else 1

    def phase() -> None:
        for _ in range(steps):
            step()

    timed = clocks.sampler([phase], torch.device(training.workload.device), steps)

    def sample() -> float:
        (seconds,) = timed()
        if on_gpu:
            training.optimizer.zero_grad()  # only one variant at a time holds gradients: 1.3 GB of BERT-large's
        return seconds

    return sample


def _launches(training: Training) -> int:
    """Count the kernels that one step launches: calls of cudaLaunchKernel, cuLaunchKernel and their relatives."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        training.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
