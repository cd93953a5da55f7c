from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.finetune import attention
from examples.finetune.data import Task
from examples.finetune.model import Checkpoint
from examples.finetune.settings import Settings, Variant
from examples.finetune.training import Run

VARIANTS = (Variant("dropout"), Variant("mixout", 0.3))


@pytest.fixture(scope="module")
def settings(reviews: Path) -> Settings:
    return Settings(
        csv=reviews, text_column="review", label_column="verdict", max_length=12, batch_size=8, variants=VARIANTS
    )


def test_each_variant_has_what_is_fastest_for_it(
    settings: Settings, checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"dropout": {"sdpa": 10.0, "eager": 11.0}, "mixout": {"sdpa": 9.0, "eager": 6.0}}
    monkeypatch.setattr(attention, "step_milliseconds", lambda *arguments: times[arguments[-1].kind])
    chosen, said = attention.choose(dataclasses.replace(settings, precision="bfloat16"), checkpoint, task)
    assert [variant.attention for variant in chosen.variants] == ["sdpa", "eager"]
    assert [variant.name for variant in chosen.variants] == [variant.name for variant in VARIANTS]
    assert "sdpa for dropout + weight decay (sdpa 10, eager 11); eager for mixout_kernels, p=0.3 (sdpa 9, eager" in said


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({}, None, "Attention: sdpa."),
        ({"attention": "eager"}, "eager", "Attention: eager."),
        ({"attention": "eager", "precision": "bfloat16"}, "eager", "Attention: eager."),
    ],
)
def test_nothing_is_measured_where_nothing_is_to_be_chosen(
    changes: dict[str, str],
    expected: str | None,
    said: str,
    settings: Settings,
    checkpoint: Checkpoint,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "step_milliseconds", lambda *_: pytest.fail("measured"))
    chosen, text = attention.choose(dataclasses.replace(settings, **changes), checkpoint, task)
    assert [variant.attention for variant in chosen.variants] == [expected] * len(VARIANTS)
    assert text == said


def test_the_steps_of_both_are_measured(settings: Settings, checkpoint: Checkpoint, task: Task) -> None:
    ms = attention.step_milliseconds(
        dataclasses.replace(settings, precision="bfloat16"), checkpoint, task, Variant("mixout", 0.3)
    )
    assert list(ms) == ["sdpa", "eager"]
    assert all(0 < value < 1e5 for value in ms.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_has_the_attention_and_the_precision_that_it_is_given(
    precision: str, settings: Settings, checkpoint: Checkpoint, task: Task
) -> None:
    asked = dataclasses.replace(settings, precision=precision)
    run = Run(asked, checkpoint, task, dataclasses.replace(VARIANTS[1], attention="eager"), 0)
    assert run.model.config._attn_implementation == "eager"
    seen = set()
    layer = next(module for module in run.model.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    run.step(*task.train.batch(torch.arange(8)))
    assert run.result.failure is None
    run.evaluate(task.test)
    assert run.result.accuracy is not None
    assert seen == {getattr(torch, precision)}
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
