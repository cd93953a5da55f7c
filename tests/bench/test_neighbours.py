"""The comparison with the published forms, on the smallest model: every row is measured, and ours match."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.common.rows import Run
from benchmarks.neighbours.__main__ import main
from benchmarks.neighbours.measurement import measure
from benchmarks.neighbours.report import draw, markdown
from benchmarks.neighbours.variants import fisher_passes, steps
from benchmarks.step.workload import Workload


def smallest(attention):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=30, max_position_embeddings=16, attn_implementation=attention, **sizes)
    return BertForSequenceClassification(config)


WORKLOAD = Workload("smallest", "the smallest BERT", "cpu", 4, 8, 30, smallest)


def test_every_row_is_measured_and_ours_match():
    rows = measure(WORKLOAD, steps(), fisher_passes(), 1, lambda text: None)
    assert [row.variant for row in rows] == [one.name for one in [*steps(), *fisher_passes()]]
    assert {row.variant: row.failure for row in rows if row.failure} == {}
    checked = {row.variant: row.matches for row in rows if row.matches is not None}
    assert set(checked.values()) == {True}
    assert set(checked) == {one.name for one in [*steps(), *fisher_passes()] if one.ours}
    saved = {row.variant: row.facts["saved_bytes"] for row in rows if "saved_bytes" in row.facts}
    assert saved["GradDrop neuron, p=0.9"] < saved["GradDrop neuron, p=0.5"] < saved["no regularisation"]
    machine = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "commit": "0123456789ab"}
    run = Run(machine, "no regularisation", rows)
    text = markdown(run, WORKLOAD, {one.name: one for one in steps()}, {one.name: one for one in fisher_passes()})
    assert all(one.name in text for one in [*steps(), *fisher_passes()])
    draw(run, WORKLOAD, {one.name: one for one in steps()})


def test_published_names_and_baselines_are_rows():
    names = {step.name for step in steps()}
    assert {step.published for step in steps()} - {None} <= names
    assert {step.baseline for step in steps()} <= names


def test_the_command_line():
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert torch.is_grad_enabled()
