"""Peak memory of training, per variant: each trains a few steps in a fresh process of its own."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .data import Encoded, Task
from .errors import FinetuneError
from .model import Checkpoint
from .settings import Settings, Variant
from .training import Run

# Gradients and Adam's state exist from the end of the first step on; the second has all at once.
STEPS = 3


def peak_mebibytes(settings: Settings, checkpoint: Checkpoint, task: Task, variant: Variant) -> float | None:
    """How far the resident memory of a process rises above what it had before the model was loaded.

    That is weights, frozen targets, gradients, Adam's state, activations and temporaries, for one model in training.
    None where the system does not tell, or the process was killed.
    """
    if sys.platform != "linux":
        return None
    inputs, labels = task.train.batch(torch.arange(min(settings.batch_size, len(task.train))))
    arrays = {name: values.numpy() for name, values in inputs.items()}
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(theirs,))
    with _interrupts_ignored():
        process.start()
    theirs.close()
    try:
        ours.send((settings, checkpoint, task.label_names, arrays, labels.numpy(), variant))
        peak = ours.recv()
    except (EOFError, ConnectionError):
        return None
    finally:
        process.kill()
        process.join()
    if isinstance(peak, FinetuneError):
        raise peak
    return peak


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that is started meanwhile never heeds Ctrl-C: its parent does, and kills it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(parent: Connection) -> None:
    settings, checkpoint, label_names, arrays, labels, variant = parent.recv()
    batch = Encoded({name: torch.from_numpy(values) for name, values in arrays.items()}, torch.from_numpy(labels))
    task = Task(batch, batch, label_names, majority_rate=0.0, description="")
    try:
        parent.send(_measure(settings, checkpoint, task, variant))
    except FinetuneError as error:
        parent.send(error)


def _measure(settings: Settings, checkpoint: Checkpoint, task: Task, variant: Variant) -> float:
    before = _status_kilobytes("VmRSS")
    run = Run(settings, checkpoint, task, variant, restart=0)
    for _ in range(STEPS):
        run.step(task.train.inputs, task.train.labels)
    return (_status_kilobytes("VmHWM") - before) / 1024


def _status_kilobytes(name: str) -> int:
    # Not getrusage: its ru_maxrss starts from the peak of the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise KeyError(name)
