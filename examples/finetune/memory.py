"""Peak memory of training, per variant."""

from __future__ import annotations

import torch
from numpy import ndarray

from benchmarks.common.memory import peak_bytes

from .data import Encoded, Task
from .model import Checkpoint
from .settings import Settings, Variant
from .training import Run

# Gradients and Adam's state exist from the end of the first step on; the second has all at once.
STEPS = 3


def peak_mebibytes(settings: Settings, checkpoint: Checkpoint, task: Task, variant: Variant) -> float | None:
    """Measure how far the resident memory of a fresh process rises above what it had before the model was loaded.

    That is weights, frozen targets, gradients, Adam's state, activations and temporaries, for one model in training.
    None where the system does not tell, or the process was killed.
    """
    inputs, labels = task.train.batch(torch.arange(min(settings.batch_size, len(task.train))))
    # As arrays: a tensor would reach the process in shared memory, which counts as its own.
    arrays = {name: values.numpy() for name, values in inputs.items()}
    peak = peak_bytes(_train, settings, checkpoint, task.label_names, arrays, labels.numpy(), variant)
    return None if peak is None else peak / 2**20


def _train(
    settings: Settings,
    checkpoint: Checkpoint,
    label_names: list[str],
    arrays: dict[str, ndarray],
    labels: ndarray,
    variant: Variant,
) -> None:
    batch = Encoded({name: torch.from_numpy(values) for name, values in arrays.items()}, torch.from_numpy(labels))
    task = Task(batch, batch, label_names, majority_rate=0.0, description="")
    run = Run(settings, checkpoint, task, variant, restart=0)
    for _ in range(STEPS):
        run.step(task.train.inputs, task.train.labels)
