"""The step benchmark on a tiny model: what its table says is what its steps do."""

import dataclasses
import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.step import agreement, measurement
from benchmarks.step.__main__ import main
from benchmarks.step.measurement import Measurement
from benchmarks.step.report import Report
from benchmarks.step.training import Training
from benchmarks.step.variants import Variant, all_variants
from benchmarks.step.workload import WORKLOADS, Workload
from mixout_kernels import MixLinear


def smallest():
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


WORKLOAD = Workload("the smallest BERT", "cpu", 4, 8, 30, smallest, goals={0.7: 0.75, 0.9: 0.65})
LOW = dataclasses.replace(WORKLOAD, low=torch.bfloat16)


@pytest.fixture
def workload(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "smallest", WORKLOAD)
    return WORKLOAD


def trained(variant, steps=2, workload=WORKLOAD):
    training = Training(workload, variant)
    for _ in range(steps):
        training.step()
    return training


def test_variants_differ_in_what_they_say():
    dropout, none, plain, layers, sampler = (
        trained(Variant(kind, 0.7 if kind in ("plain", "layers", "sampler") else 0.0))
        for kind in ("dropout", "none", "plain", "layers", "sampler")
    )

    def rates(training):
        return {m.p for m in training.model.modules() if isinstance(m, torch.nn.Dropout)}

    assert rates(dropout) == {0.1}
    assert rates(none) == rates(plain) == rates(layers) == rates(sampler) == {0.0}
    mixed = [m for m in layers.model.modules() if isinstance(m, MixLinear)]
    assert len(mixed) == 13
    assert all(m.p == 0.7 and m.slot is None for m in mixed)
    assert all(m.slot is not None for m in sampler.model.modules() if isinstance(m, MixLinear))
    assert sampler.sampler.step == 2
    weights = sum(m.weight.nbytes for m in mixed)
    assert plain.target_bytes == layers.target_bytes == sampler.target_bytes == weights
    assert dropout.target_bytes == none.target_bytes == 0
    assert trained(Variant("premix", 0.7)).mixed_bytes == weights
    assert layers.mixed_bytes == 0


def test_kept_columns_save_less_at_a_higher_p():
    saved = {p: trained(Variant("sampler", p)).saved_bytes() for p in (0.5, 0.9)}
    assert saved[0.9] < saved[0.5] < trained(Variant("none")).saved_bytes() < trained(Variant("dropout")).saved_bytes()


@pytest.mark.parametrize("kind", ["staged", "layers", "sampler", "premix"])
@pytest.mark.parametrize("workload", [WORKLOAD, LOW], ids=["float32", "bfloat16"])
def test_a_step_matches_the_reference(kind, workload):
    assert agreement.matches_reference(trained(Variant(kind, 0.7), workload=workload))


@pytest.mark.parametrize("kind", ["staged", "layers", "sampler", "premix"])
@pytest.mark.parametrize(("workload", "factor"), [(WORKLOAD, 1.001), (LOW, 1.1)], ids=["float32", "bfloat16"])
def test_a_wrong_gradient_does_not(kind, workload, factor, monkeypatch):
    training = trained(Variant(kind, 0.7), workload=workload)
    cpu = agreement.backends.load("cpu")
    backward = cpu.mix_linear_backward

    def wrong(*arguments):
        dx, dw, db = backward(*arguments)
        return dx, dw * factor, db

    monkeypatch.setattr(cpu, "mix_linear_backward", wrong)
    assert not agreement.matches_reference(training)


def test_every_round_has_one_step_of_each(workload, monkeypatch):
    monkeypatch.setattr(measurement, "peak_bytes", lambda _, variants: dict.fromkeys(variants, 5 << 20))
    variants = [variant for variant in all_variants() if variant.kind != "compiled"]
    said = []
    found = measurement.measure("smallest", variants, rounds=3, with_memory=True, say=said.append)
    assert [m.variant for m in found] == [variant.name for variant in variants]
    assert all(len(m.milliseconds) == 3 and min(m.milliseconds) > 0 and m.peak_bytes == 5 << 20 for m in found)
    assert {m.kind for m in found if m.matches_reference} == {"staged", "layers", "sampler", "premix"}
    assert len(said) == len(variants) + 2  # the memory, each warm-up, the rounds


def test_peak_memory_of_a_fresh_process():
    """At least weights, gradients and Adam's two moments, and on top of it the targets and Phi."""
    parameters = sum(p.nbytes for p in WORKLOADS["tiny"].model().parameters())
    dropout, compiled, sampler = Variant("dropout"), Variant("compiled", 0.7), Variant("sampler", 0.7)
    found = measurement.peak_bytes("tiny", [dropout, compiled, sampler])
    assert set(found) == {dropout, sampler}
    assert all(4 * parameters < peak < 40 * parameters for peak in found.values())


def report_of(**changes):
    def of(kind, p, *milliseconds, matches=None):
        return Measurement(Variant(kind, p).name, kind, p, matches, 1 << 20, 2 << 20, 0, milliseconds=[*milliseconds])

    found = [of("dropout", 0.0, 100, 90, 200), of("sampler", 0.7, 70, 60, 500, matches=changes.get("matches", True))]
    return Report(WORKLOAD, {"cpu": "a CPU"}, found)


def test_ratios_are_of_medians_and_goals_are_judged_by_them():
    text = report_of().markdown()
    assert "- p=0.7: 0.700 x dropout, to reach at most 0.75: yes" in text
    assert "| mixout_kernels, sampler, p=0.7 | yes | 70.0 | 65.0 - 285.0 | 0.700 | - | 1.0 | 2.0 | - |" in text


def test_a_wrong_step_gets_no_ratio():
    text = report_of(matches=False).markdown()
    assert "**NO** | 70.0 | 65.0 - 285.0 | **wrong**" in text
    assert "to reach at most 0.75: **no**" in text


def test_command(tmp_path, capsys, workload, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny", WORKLOAD)
    assert main(["--quick", "--rounds", "2", "--only", "sampler", "--output", str(tmp_path), "--device", "cpu"]) == 0
    saved = json.loads((tmp_path / "cpu.json").read_text())
    names = [row["variant"] for row in saved["variants"]]
    assert names[0] == "dropout 0.1"
    assert len(names) == 5
    assert all("sampler" in name for name in names[1:])
    assert all(len(row["milliseconds"]) == 2 for row in saved["variants"])
    assert (tmp_path / "cpu.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_errors(capsys):
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds: expected 1 or more, got 0" in capsys.readouterr().err
