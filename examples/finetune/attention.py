"""The attention of each variant: what is fastest for it on this machine, since variants differ in that.

Without dropout torch's sdpa takes its flash kernel on a CPU, which in bfloat16 and with short sequences takes longer
than three matrix products do. In float32 the two measured alike, so nothing is chosen there.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from .data import Task
from .model import Checkpoint
from .settings import Attention, Settings, Variant
from .training import Run

CANDIDATES: tuple[Attention, ...] = ("sdpa", "eager")
# The first step makes Adam's state and the second runs in the memory that stays. Seven more are a second each at most
# for MiniLM, and their median is steady enough for what differs by a tenth and more.
WARMUP_STEPS, TIMED_STEPS = 2, 7


def choose(settings: Settings, checkpoint: Checkpoint, task: Task) -> tuple[Settings, str]:
    """Give every variant its attention, and say which.

    That of ``settings.attention`` where it is given; transformers' own choice in float32, and for a model that has no
    sdpa; else whatever takes less time for the variant: so ratios are those of steps that each run as fast as they can.
    """
    own = checkpoint.attention(settings.attention)
    if settings.attention is not None or settings.precision == "float32" or own != "sdpa":
        variants = tuple(replace(variant, attention=settings.attention) for variant in settings.variants)
        return replace(settings, variants=variants), f"Attention: {own}."
    chosen, said = [], []
    for variant in settings.variants:
        ms = step_milliseconds(settings, checkpoint, task, variant)
        fastest = min(ms, key=lambda name: ms[name])
        chosen.append(replace(variant, attention=fastest))
        said.append(f"{fastest} for {variant.name} ({', '.join(f'{name} {ms[name]:.0f}' for name in ms)})")
    text = f"Attention: for each variant what is fastest here, by the ms of a step: {'; '.join(said)}."
    return replace(settings, variants=tuple(chosen)), text


def step_milliseconds(
    settings: Settings, checkpoint: Checkpoint, task: Task, variant: Variant
) -> dict[Attention, float]:
    """Measure the variant's step with every attention that the model has, in turn."""
    inputs, labels = task.train.batch(torch.arange(min(settings.batch_size, len(task.train))))
    runs = {name: Run(settings, checkpoint, task, replace(variant, attention=name), restart=0) for name in CANDIDATES}
    times: dict[Attention, list[float]] = {name: [] for name in runs}
    for number in range(WARMUP_STEPS + TIMED_STEPS):
        for name, run in runs.items():
            start = time.perf_counter()
            run.step(inputs, labels)
            if number >= WARMUP_STEPS:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(found) for name, found in times.items()}
