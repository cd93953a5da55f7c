"""The step benchmark on a tiny model: what its table says is what its steps do."""

import dataclasses
import gc
import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.step import agreement, measurement
from benchmarks.step.__main__ import _parse, _variants, main
from benchmarks.step.measurement import Measurement
from benchmarks.step.report import Report
from benchmarks.step.training import Captured, Training
from benchmarks.step.variants import Variant, all_variants
from benchmarks.step.workload import WORKLOADS, Workload
from mixout_kernels import MixLinear, backends, sampler


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


class Replayed:
    """Stands in for a CUDA graph where there is none: the same weights, its own gradients."""

    def __init__(self, training, factor=1.0):
        self.training, self.factor = training, factor
        self.step = training.step

    def gradients(self):
        self.training.backward()
        return {name: self.factor * gradient for name, gradient in self.training.gradients().items()}


def test_a_replay_is_as_near_to_the_reference_as_the_eager_step():
    training = trained(Variant("sampler", 0.7), workload=LOW)
    assert agreement.replay_matches_reference(Replayed(training))
    assert not agreement.replay_matches_reference(Replayed(training, factor=1.1))


def test_a_check_leaves_nothing_behind():
    """Neither a sampler that follows every optimizer step nor its gradients for the next one."""
    training = trained(Variant("sampler", 0.7))
    gc.collect()  # samplers of the tests before
    samplers = set(sampler._alive)
    assert agreement.matches_reference(training)
    assert set(sampler._alive) == samplers
    assert all(p.grad is None for p in training.model.parameters())


def test_no_model_in_float64_lives_through_the_rounds(workload, monkeypatch):
    interleave = measurement.interleave

    def in_float64():
        return {id(o) for o in gc.get_objects() if type(o) is torch.nn.Parameter and o.dtype == torch.float64}

    before = in_float64()

    def watched(*arguments):
        assert in_float64() <= before
        return interleave(*arguments)

    monkeypatch.setattr(measurement, "interleave", watched)
    gc.disable()  # as a check that is not followed by an automatic collection
    try:
        measurement.measure("smallest", [Variant("sampler", 0.7)], 1, False, lambda _: None)
    finally:
        gc.enable()


def test_full_sequences_need_no_attention_mask():
    training = Training(WORKLOAD, Variant("dropout"))
    losses = []
    for mask in ({}, {"attention_mask": torch.ones_like(training.batch["input_ids"])}):
        torch.manual_seed(0)
        losses.append(training.model(**training.batch, **mask).loss)
    assert torch.equal(*losses)


def test_every_round_has_one_step_of_each(workload, monkeypatch):
    monkeypatch.setattr(measurement, "peak_bytes", lambda _, variants: dict.fromkeys(variants, 5 << 20))
    variants = [variant for variant in all_variants() if variant.mode == "eager"]
    said = []
    found = measurement.measure("smallest", variants, rounds=3, with_memory=True, say=said.append)
    assert [m.variant for m in found] == [variant.name for variant in variants]
    assert all(len(m.milliseconds) == 3 and min(m.milliseconds) > 0 and m.peak_bytes == 5 << 20 for m in found)
    assert {m.kind for m in found if m.matches_reference} == {"staged", "layers", "sampler", "premix", "triton"}
    assert len(said) == len(variants) + 2  # the memory, each warm-up, the rounds


def test_peak_memory_of_a_fresh_process():
    """At least weights, gradients and Adam's two moments, and on top of it the targets and Phi."""
    parameters = sum(p.nbytes for p in WORKLOADS["tiny"].model().parameters())
    dropout, compiled, sampler = Variant("dropout"), Variant("plain", 0.7, "compiled"), Variant("sampler", 0.7)
    found = measurement.peak_bytes("tiny", [dropout, compiled, sampler])
    assert set(found) == {dropout, sampler}
    assert all(4 * parameters < peak < 40 * parameters for peak in found.values())


def test_a_graph_trains_the_weights_of_its_eager_row(workload, monkeypatch):
    monkeypatch.setattr(measurement, "Captured", Replayed)
    monkeypatch.setattr(measurement, "_gpu_sampler", lambda step, training: measurement._cpu_sampler(training))
    variants = [Variant("dropout", mode="graph"), Variant("sampler", 0.7, "graph")]
    variants = [*variants, *(variant.eager for variant in variants)]
    said = []
    found = measurement.measure("smallest", variants, 2, False, said.append)
    assert [m.variant for m in found] == [variant.name for variant in variants]
    assert [m.mode for m in found] == ["graph", "graph", "eager", "eager"]
    assert [m.matches_reference for m in found] == [None, True, None, True]
    assert said[2:4] == ["dropout 0.1, CUDA graph: warm-up", "mixout_kernels, sampler, p=0.7, CUDA graph: warm-up"]
    assert [m.saved_bytes for m in found[:2]] == [m.saved_bytes for m in found[2:]]


def names_of(*arguments):
    return [variant.name for variant in _variants(_parse([*arguments]))]


def test_rows_on_a_cpu():
    names = names_of("--device", "cpu")
    assert len(names) == 12
    assert names[3] == "torch.compile(plain formula), p=0.7"
    assert not [name for name in names if "graph" in name or "compile(dropout" in name]
    assert names_of("--device", "cpu", "--quick") == [name for name in names if "compile" not in name]


def test_rows_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends.load("cuda"), "unavailable_reason", lambda: None)
    names = names_of("--device", "cuda")
    assert "mixout_kernels, sampler, Triton, p=0.7" in names
    assert names[-1] == "mixout_kernels, sampler, Triton, p=0.7, CUDA graph"
    monkeypatch.setattr(backends.load("cuda"), "unavailable_reason", lambda: "not built")
    names = names_of("--device", "cuda")
    assert not any("Triton" in name for name in names)
    assert names[-5:] == [
        "torch.compile(dropout 0.1)",
        "torch.compile(mixout_kernels, sampler), p=0.7",
        "dropout 0.1, CUDA graph",
        "mixout_kernels, sampler, p=0.7, CUDA graph",
        "mixout_kernels, sampler, p=0.9, CUDA graph",
    ]
    assert names_of("--device", "cuda", "--only", "9, CUDA graph", "--no-compile") == [
        "dropout 0.1",
        "mixout_kernels, sampler, p=0.9",
        "dropout 0.1, CUDA graph",
        "mixout_kernels, sampler, p=0.9, CUDA graph",
    ]


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


def test_a_graph_is_judged_by_dropout_in_a_graph():
    def of(variant, milliseconds):
        return Measurement(
            variant.name, variant.kind, variant.p, None, 1 << 20, 0, 0, milliseconds=[milliseconds], mode=variant.mode
        )

    dropout, sampler = Variant("dropout"), Variant("sampler", 0.7)
    graphs = [dataclasses.replace(variant, mode="graph") for variant in (dropout, sampler)]
    found = [of(dropout, 100), of(sampler, 90), of(graphs[0], 50), of(graphs[1], 30)]
    on_gpu = dataclasses.replace(WORKLOAD, device="cuda")
    text = Report(on_gpu, {"gpu": "a GPU"}, found).markdown()
    assert "- p=0.7: 0.900 x dropout, to reach at most 0.75: **no**" in text
    assert "- p=0.7, CUDA graph: 0.600 x dropout in one, to reach at most 0.75: yes" in text
    assert "| mixout_kernels, sampler, p=0.7 | - | 90.0 | 90.0 - 90.0 | 0.900 | 0.900 |" in text
    assert "| mixout_kernels, sampler, p=0.7, CUDA graph | - | 30.0 | 30.0 - 30.0 | 0.300 | 0.600 |" in text


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


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: steps on a GPU, and CUDA graphs")


@needs_gpu
def test_command_on_a_gpu(tmp_path):
    assert main(["--quick", "--rounds", "2", "--output", str(tmp_path), "--device", "cuda"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["variants"]}
    assert list(rows) == names_of("--device", "cuda", "--quick")
    graphs = [row for row in rows.values() if row["mode"] == "graph"]
    assert [row["matches_reference"] for row in graphs] == [None, True, True]
    for row in rows.values():
        assert len(row["milliseconds"]) == 2
        assert min(row["milliseconds"]) > 0
        if row["mode"] == "eager":
            assert row["launches"] > 100
            assert row["peak_bytes"] > rows["dropout 0.1"]["saved_bytes"]


@needs_gpu
def test_compiled_steps_on_a_gpu():
    variants = [variant for variant in all_variants() if variant.mode == "compiled" or variant == Variant("dropout")]
    found = measurement.measure("tiny-gpu", variants, 1, False, lambda _: None)
    assert [m.matches_reference for m in found if m.kind == "sampler"] == [True]
    assert all(m.launches > 10 for m in found)


@needs_gpu
def test_replays_and_eager_steps_take_turns():
    training = trained(Variant("sampler", 0.7), workload=WORKLOADS["tiny-gpu"])
    captured = Captured(training)
    weight = training.model.bert.pooler.dense.weight
    for _ in range(3):
        step, before = training.sampler.step, weight.detach().clone()
        captured.step()
        assert training.sampler.step == step + 1
        assert not torch.equal(weight, before)
        assert agreement.replay_matches_reference(captured)
        training.step()
        assert agreement.matches_reference(training)
