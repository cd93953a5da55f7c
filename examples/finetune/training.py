"""The training itself: all variants of a restart side by side, one step each in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import neighbours
from .data import Encoded, Task
from .model import Checkpoint
from .settings import Settings, Variant

EVALUATION_BATCH = 64


@dataclass
class Result:
    """The result of one variant in one restart."""

    variant: str
    restart: int
    seed: int
    accuracy: float | None = None  # None: it failed
    failure: str | None = None
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def as_line(self) -> dict[str, str | int | float | None]:
        """Sum it up in the columns of the CSV; the first step of a restart makes Adam's state, and is left out."""
        seconds, losses = self.step_seconds[1:], self.losses
        return {
            "variant": self.variant,
            "restart": self.restart,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "failure": self.failure,
            "steps": len(losses),
            "last_loss": f"{losses[-1]:.4g}" if losses else None,
            "median_step_ms": f"{1e3 * statistics.median(seconds):.4g}" if seconds else None,
        }


class Run:
    """A variant in training. Equal seeds give equal heads, and each step has a random stream of its own.

    So a result does not depend on which other variants are trained alongside.
    """

    def __init__(self, settings: Settings, checkpoint: Checkpoint, task: Task, variant: Variant, restart: int) -> None:
        seed = settings.seed + restart
        self.result = Result(variant.name, restart, seed)
        torch.manual_seed(seed)
        self.model = checkpoint.load(len(task.label_names), variant.attention)
        self.precision = settings.precision
        rows = torch.arange(len(task.train)).split(settings.batch_size)
        batches = ({**inputs, "labels": labels} for inputs, labels in map(task.train.batch, rows))
        variant.prepare(self.model, batches)
        self.kind = variant.kind
        self.model.train()
        weight_decay = variant.weight_decay(settings.weight_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=weight_decay, fused=True
        )
        factor = warmup_then_decay(total_steps(settings, len(task.train)), settings.warmup)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        number = len(self.result.losses)
        torch.manual_seed(self.result.seed * 1_000_003 + number + 1)
        start = time.perf_counter()
        with self.autocast():
            loss = neighbours.loss(self.kind, self.model, inputs, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        value = loss.item()
        self.result.step_seconds.append(time.perf_counter() - start)
        self.result.losses.append(value)
        if not math.isfinite(value):
            self.result.failure = f"the loss became {value} at step {number + 1}"

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16")

    @torch.inference_mode()
    def evaluate(self, test: Encoded) -> None:
        self.model.eval()
        correct = 0
        for inputs, labels in test.evaluation_batches(EVALUATION_BATCH):
            with self.autocast():
                logits = self.model(**inputs).logits
            if not logits.isfinite().all():
                self.result.failure = "the trained model's outputs are not finite"
                return
            correct += int((logits.argmax(-1) == labels).sum())
        self.result.accuracy = correct / len(test)


def train_restart(
    settings: Settings, checkpoint: Checkpoint, task: Task, restart: int, on_step: Callable[[], None]
) -> list[Result]:
    """One result per variant. ``on_step`` is called after every step, and after the evaluation, of every variant."""
    runs = [Run(settings, checkpoint, task, variant, restart) for variant in settings.variants]
    results = [run.result for run in runs]
    for number, rows in enumerate(batches(settings, len(task.train), settings.seed + restart)):
        inputs, labels = task.train.batch(rows)
        # Interleaved, and each in turn first, so that other load on the machine and what a step leaves in the caches
        # weigh on all alike.
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            if run.result.failure is None:
                run.step(inputs, labels)
            on_step()
    while runs:
        run = runs.pop()  # so that its model is freed
        if run.result.failure is None:
            run.evaluate(task.test)
        on_step()
    return results


def total_steps(settings: Settings, rows: int) -> int:
    return settings.steps or settings.epochs * math.ceil(rows / settings.batch_size)


def batches(settings: Settings, rows: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of each step: every epoch a new order of all rows."""
    generator = torch.Generator().manual_seed(seed)
    remaining = total_steps(settings, rows)
    while remaining > 0:
        for batch in torch.randperm(rows, generator=generator).split(settings.batch_size)[:remaining]:
            yield batch
            remaining -= 1


def warmup_then_decay(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate at a step: linearly up for the first part, then linearly down to zero."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (steps - step) / max(1, steps - rise)

    return factor
