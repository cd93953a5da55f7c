"""One fine-tuning of MiniLM on movie sentences under a strategy of the paper: what its sections 5 and 6 are made of.

The training is that of ``examples.finetune``: its splits, heads, batches, schedule and random streams, so that all
strategies of a restart share head and batches. Here are the strategies, and two ways to spend less on a run that change
nothing in it: one thread a run, and a vocabulary of the tokens that occur.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mixout_kernels as mk
from benchmarks.common import assets
from examples.finetune.data import Encoded, Task, load_task
from examples.finetune.model import Checkpoint
from examples.finetune.neighbours import Batches
from examples.finetune.settings import Settings, Variant
from examples.finetune.training import Run, batches


@dataclass(frozen=True)
class Strategy(Variant):
    """A variant of ``examples.finetune`` with what the paper combines it with."""

    dropout: float | None = None  # every rate of the model; None: those of its config, which are 0.1
    pull: float = 0.0  # lambda of wdecay(w_pre, lambda), in place of the decay to zero
    head: bool = False  # mixes the new head with its own initial weight, as section 6.2

    def prepare(self, model: nn.Module, batches: Batches = ()) -> None:
        if self.head:
            mk.apply_mixout(model, p=self.p, mask=self.mask, exclude=())
        else:
            super().prepare(model, batches)
        if self.kind == "mixout":
            mk.MixSampler(model)
        if self.dropout is not None:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = self.dropout

    def weight_decay(self, rate: float) -> float:
        return 0.0 if self.pull else super().weight_decay(rate)


def dropout(p: float) -> str:
    return f"dropout({p:g}), wdecay(0, 0.01)"


def mixout(p: float) -> str:
    return f"mixout(w_pre, {p:g})"


def wdecay(rate: float) -> str:
    """Alone, as in the paper: without dropout."""
    return f"wdecay(w_pre, {rate:g})"


def mixed_head(p: float) -> str:
    return f"{mixout(p)}, new head: mixout(w_0, {p:g})"


TENTHS = tuple(round(0.1 * k, 1) for k in range(10))
STRATEGIES: dict[str, Strategy] = {
    **{dropout(p): Strategy("dropout", dropout=p) for p in TENTHS},
    **{wdecay(rate): Strategy("dropout", dropout=0.0, pull=rate) for rate in (0.01, 0.04, 0.07, 0.1)},
    **{mixout(p): Strategy("mixout", p) for p in TENTHS},
    f"{mixout(0.7)}, {wdecay(0.01)}": Strategy("mixout", 0.7, pull=0.01),
    mixed_head(0.7): Strategy("mixout", 0.7, head=True),
    "GradDrop(0.5)": Strategy("graddrop", 0.5),
    "guided dropout": Strategy("guided"),
    "R3F": Strategy("r3f"),
}


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is run."""

    restarts: int = 20
    rows: int = 1000  # of the test split
    steps: int | None = None  # None: three epochs


FILE = "finetuning.jsonl"  # of all experiments on MiniLM: a run that two of them need is run once
FULL, QUICK = Scale(), Scale(restarts=2, rows=64, steps=2)


@dataclass(frozen=True)
class Material:
    """What all runs on one training split share."""

    settings: Settings
    checkpoint: Checkpoint
    task: Task
    tokens: Tensor  # those that occur, ascending
    trimmed: Task  # the task in numbers of ``tokens``


def material_of(settings: Settings, checkpoint: Checkpoint, rows: int) -> Material:
    """``rows`` of the test or validation split are evaluated, spread over it, since it goes movie by movie."""
    task = load_task(settings, checkpoint.tokenizer)
    last = len(task.test) - 1
    test = Encoded(*task.test.batch(torch.linspace(0, last, min(rows, last + 1), dtype=torch.float64).round().long()))
    majority = test.labels.bincount().max().item() / len(test)
    task = dataclasses.replace(task, test=test, majority_rate=majority)
    padding = torch.tensor([checkpoint.tokenizer.pad_token_id])
    tokens = torch.cat([padding, *(part.inputs["input_ids"].flatten() for part in (task.train, test))]).unique()

    def renumbered(part: Encoded) -> Encoded:
        return Encoded({**part.inputs, "input_ids": torch.searchsorted(tokens, part.inputs["input_ids"])}, part.labels)

    trimmed = dataclasses.replace(task, train=renumbered(task.train), test=renumbered(test))
    return Material(settings, checkpoint, task, tokens, trimmed)


@functools.cache
def material(size: int, split: str, rows: int) -> Material:
    settings = Settings(train_size=size, validate=split == "validation")
    return material_of(settings, Checkpoint(assets.minilm(assets.cache_folder()), settings.max_length), rows)


def trim_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    """Keep the embeddings of ``tokens`` alone, renumbered, in the same Parameter.

    This changes no output: the rows left out are read by no batch, so their gradients are zero and what an optimizer
    does to them is never seen. They are half of MiniLM's parameters, and a quarter of the time of a step.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        embedding.weight.data = embedding.weight[tokens].clone()
    embedding.num_embeddings = len(tokens)
    if embedding.padding_idx is not None:
        embedding.padding_idx = int(torch.searchsorted(tokens, embedding.padding_idx))


def begin(strategy: Strategy, material: Material, settings: Settings, restart: int) -> Run:
    """A run that is fed with batches of ``material.trimmed``."""
    run = Run(settings, material.checkpoint, material.task, strategy, restart)
    # After what is measured of the whole model: guided dropout ranks the embeddings by their mean Fisher information.
    trim_vocabulary(run.model, material.tokens)
    if strategy.pull:
        mk.decay_to_target(run.optimizer, run.model, strategy.pull)
    return run


def settings_of(strategy: str, size: int, rate: float, restart: int, scale: Scale) -> dict[str, Any]:
    """What :func:`fine_tune` takes, for a run that is reported."""
    rate = float(f"{rate:.6g}")  # a multiple of a rate that was read from a file is itself again
    found = {"strategy": strategy, "size": size, "rate": rate, "split": "test", "rows": scale.rows, "restart": restart}
    return found if scale.steps is None else {**found, "steps": scale.steps}


def fine_tune(
    strategy: str, size: int, rate: float, split: str, rows: int, restart: int, steps: int | None = None
) -> Mapping[str, Any]:
    """One line of results. A run whose loss is no longer finite has a failure and no accuracy."""
    found = material(size, split, rows)
    settings = dataclasses.replace(found.settings, lr=rate, steps=steps)
    with one_thread():
        run = begin(STRATEGIES[strategy], found, settings, restart)
        for chosen in batches(settings, len(found.task.train), settings.seed + restart):
            if run.result.failure is None:
                run.step(*found.trimmed.train.batch(chosen))
        if run.result.failure is None:
            run.evaluate(found.trimmed.test)
    result = run.result
    del run
    gc.collect()  # a model with hooks is a circle of references, and the collector counts objects, not their bytes
    return {
        "accuracy": result.accuracy,
        "failure": result.failure,
        "last_loss": float(f"{result.losses[-1]:.4g}"),
        "majority": found.task.majority_rate,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one core: results then do not depend on how many there are, and two runs at once use two cores better."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
