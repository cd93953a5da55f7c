from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.common.errors import CommandError
from examples.finetune import neighbours
from examples.finetune.data import Task
from examples.finetune.memory import peak_mebibytes
from examples.finetune.model import Checkpoint
from examples.finetune.neighbours import NEIGHBOURS, Batches
from examples.finetune.settings import Settings, Variant
from examples.finetune.training import Run, batches, total_steps, train_restart, warmup_then_decay

from .conftest import save_checkpoint

ALL = tuple(Variant(kind, p) for kind, p in (("dropout", 0.0), ("plain", 0.3), ("mixout", 0.3)))


@pytest.fixture(scope="module")
def settings(reviews: Path) -> Settings:
    return Settings(
        csv=reviews,
        text_column="review",
        label_column="verdict",
        max_length=12,
        batch_size=8,
        epochs=10,
        lr=1e-2,
        variants=ALL,
    )


def test_every_variant_learns(settings: Settings, checkpoint: Checkpoint, task: Task) -> None:
    calls = []
    results = train_restart(settings, checkpoint, task, 0, lambda: calls.append(None))
    assert [result.variant for result in results] == [variant.name for variant in ALL]
    for result in results:
        assert result.failure is None
        assert result.accuracy > task.majority_rate  # one word of the text gives the label away
        assert len(result.losses) == len(result.step_seconds) == total_steps(settings, len(task.train)) == 60
        assert sum(result.losses[-6:]) < sum(result.losses[:6])
    assert len(calls) == len(ALL) * (60 + 1)


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.kind)
def test_a_result_does_not_depend_on_its_neighbours(
    variant: Variant, settings: Settings, checkpoint: Checkpoint, task: Task
) -> None:
    short = dataclasses.replace(settings, steps=5)
    alone = dataclasses.replace(short, variants=(variant,))
    among = {result.variant: result for result in train_restart(short, checkpoint, task, 1, lambda: None)}
    (result,) = train_restart(alone, checkpoint, task, 1, lambda: None)
    assert result.losses == among[variant.name].losses
    assert result.accuracy == among[variant.name].accuracy


def test_seeds_are_the_restarts_and_heads_are_shared(settings: Settings, checkpoint: Checkpoint, task: Task) -> None:
    # With p = 0 both compute the same: same head, same batches, same schedule.
    same = (Variant("plain", 0.0), Variant("mixout", 0.0))
    short = dataclasses.replace(settings, steps=4, variants=same)
    first, mixout = (result.losses for result in train_restart(short, checkpoint, task, 0, lambda: None))
    assert first == pytest.approx(mixout, rel=1e-5)
    other, *_ = train_restart(short, checkpoint, task, 1, lambda: None)
    assert other.losses != first
    shifted, *_ = train_restart(dataclasses.replace(short, seed=1), checkpoint, task, 0, lambda: None)
    assert shifted.losses == other.losses


def test_a_run_that_diverges_fails_alone(
    settings: Settings, checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Variant.prepare

    def poisoned(variant: Variant, model: nn.Module, batches: Batches) -> None:
        prepare(variant, model, batches)
        if variant.kind == "plain":
            model.classifier.bias.data.fill_(math.nan)

    monkeypatch.setattr(Variant, "prepare", poisoned)
    calls = []
    short = dataclasses.replace(settings, steps=3)
    results = train_restart(short, checkpoint, task, 0, lambda: calls.append(None))
    outcomes = {result.variant: (result.accuracy is None, result.failure, len(result.losses)) for result in results}
    assert outcomes.pop("plain formula, p=0.3") == (True, "the loss became nan at step 1", 1)
    assert set(outcomes.values()) == {(False, None, 3)}
    assert len(calls) == len(ALL) * (3 + 1)


def test_a_model_that_breaks_in_its_last_step_fails(settings: Settings, checkpoint: Checkpoint, task: Task) -> None:
    reckless = dataclasses.replace(settings, steps=1, lr=1e38)
    for result in train_restart(reckless, checkpoint, task, 0, lambda: None):
        assert result.accuracy is None
        assert result.failure == "the trained model's outputs are not finite"


@pytest.mark.parametrize(("epochs", "steps", "expected"), [(2, None, 8), (1, 3, 3), (1, 9, 9)])
def test_batches_go_over_all_rows_anew(epochs: int, steps: int | None, expected: int) -> None:
    settings = Settings(epochs=epochs, steps=steps, batch_size=3)
    found = list(batches(settings, 10, seed=5))
    assert len(found) == total_steps(settings, 10) == expected
    for epoch in range(expected // 4):
        assert torch.cat(found[4 * epoch : 4 * epoch + 4]).sort().values.tolist() == list(range(10))
    counts = Counter(torch.cat(found).tolist())
    assert max(counts.values()) - min([counts[row] for row in range(10)]) <= 1


def test_schedule() -> None:
    factor = warmup_then_decay(20, 0.2)
    assert [factor(step) for step in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1]
    assert [factor(step) for step in (4, 12, 20)] == [1, 0.5, 0]
    assert all(0 < warmup_then_decay(steps, 0.1)(step) <= 1 for steps in (1, 2, 3) for step in range(steps))


def test_weight_decay_and_dropout_belong_to_the_standard_recipe(checkpoint: Checkpoint) -> None:
    assert [variant.weight_decay(0.01) for variant in ALL] == [0.01, 0, 0]
    rates = {}
    for variant in ALL:
        model = checkpoint.load(2)
        variant.prepare(model)
        rates[variant.kind] = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {"dropout": {0.1}, "plain": {0.0}, "mixout": {0.0}}


def test_a_model_without_linear_layers_to_mix_is_one_line() -> None:
    with pytest.raises(CommandError, match="nothing to mix"):
        Variant("mixout", 0.5).prepare(nn.Sequential(nn.ReLU()))


def test_peak_memory_is_that_of_the_training(settings: Settings, task: Task, tmp_path: Path) -> None:
    # Weight, gradient and two moments in float32. Modules that are imported on first use took 31 MiB more.
    checkpoint = Checkpoint(save_checkpoint(tmp_path, hidden_size=512, intermediate_size=2048), 12)
    parameters = sum(parameter.numel() for parameter in checkpoint.load(2).parameters())
    expected = 4 * 4 * parameters / 2**20
    peak = peak_mebibytes(settings, checkpoint, task, Variant("dropout"))
    assert expected <= peak <= expected + 64


NEIGHBOUR_VARIANTS = tuple(Variant(kind, 0.5) for kind in NEIGHBOURS)


def test_the_neighbours_learn(settings: Settings, checkpoint: Checkpoint, task: Task) -> None:
    chosen = dataclasses.replace(settings, variants=NEIGHBOUR_VARIANTS)
    results = train_restart(chosen, checkpoint, task, 0, lambda: None)
    assert [result.variant for result in results] == [variant.name for variant in NEIGHBOUR_VARIANTS]
    for result in results:
        assert result.failure is None
        assert sum(result.losses[-6:]) < sum(result.losses[:6]), result.variant
        assert result.accuracy > task.majority_rate, result.variant


def test_the_neighbours_are_what_they_say(settings: Settings, checkpoint: Checkpoint, task: Task) -> None:
    runs = {v.kind: Run(settings, checkpoint, task, v, 0) for v in NEIGHBOUR_VARIANTS}
    inputs, labels = task.train.batch(torch.arange(8))
    for run in runs.values():
        run.model.zero_grad()
        neighbours.loss(run.kind, run.model, inputs, labels).backward()
    zeros = {
        kind: [
            (p.grad == 0).double().mean().item() for name, p in run.model.named_parameters() if "dense.weight" in name
        ]
        for kind, run in runs.items()
    }
    assert all(0.2 < share < 0.8 for share in zeros["graddrop"])
    assert all(0.6 < share < 0.8 for share in zeros["childtuning-f"])
    assert max(zeros["childtuning-d"]) > 0.5
    assert max(zeros["guided"] + zeros["r3f"]) < 0.2
    rates = {m.p for m in runs["guided"].model.modules() if isinstance(m, nn.Dropout)}
    assert len(rates) > 3
