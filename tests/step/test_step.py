"""The step benchmark on a tiny model: what its table says is what its steps do."""

import csv
import dataclasses
import gc

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.common.agreement import Verdict
from benchmarks.common.rows import Row, Run
from benchmarks.step import agreement, measurement
from benchmarks.step.__main__ import _parse, choose, main
from benchmarks.step.report import draw, markdown
from benchmarks.step.training import Captured, Training
from benchmarks.step.variants import Variant, all_variants
from benchmarks.step.workload import WORKLOADS, Workload
from mixout_kernels import MixLinear, backends
from mixout_kernels.sampler.following import followers

MACHINE = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "commit": "0123456789ab"}
SILENT = {"with_memory": False, "say": lambda text: None}


def smallest(attention):
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config)


GOALS = {("float32", "sdpa", 0.7): 0.75, ("float32", "sdpa", 0.9): 0.65}
WORKLOAD = Workload("smallest", "the smallest BERT", "cpu", 4, 8, 30, smallest, goals=GOALS)
PRECISIONS = ["float32", "bfloat16", "float16", "medium"]


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
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_matches_the_reference(kind, precision):
    assert agreement.check(trained(Variant(kind, 0.7, precision=precision))).matches


def test_medium_is_torch_s_switch_for_forward_and_backward_alone(monkeypatch):
    seen = []
    training = trained(Variant("sampler", 0.7, precision="medium"))
    loss = training.loss

    def watched():
        found = loss()
        seen.append(torch.get_float32_matmul_precision())
        found.register_hook(lambda _: seen.append(torch.get_float32_matmul_precision()))
        return found

    monkeypatch.setattr(training, "loss", watched)
    training.step()
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == "highest"
    assert training.variant.name == "mixout_kernels, sampler, p=0.7, medium"


@pytest.mark.parametrize("kind", ["staged", "layers", "sampler", "premix"])
@pytest.mark.parametrize(("precision", "factor"), [("float32", 1.001), ("bfloat16", 1.1)])
def test_a_wrong_gradient_does_not(kind, precision, factor, monkeypatch):
    training = trained(Variant(kind, 0.7, precision=precision))
    right = training.fresh_gradients
    mixed = {f"{name}.weight" for name, module in training.model.named_modules() if isinstance(module, MixLinear)}

    def wrong():
        return {name: dw * factor if name in mixed else dw for name, dw in right().items()}

    monkeypatch.setattr(training, "fresh_gradients", wrong)
    assert not agreement.check(training).matches


@pytest.mark.parametrize("kind", ["layers", "sampler"])
def test_micro_batches_have_the_gradient_of_the_batch(kind, monkeypatch):
    training = trained(Variant(kind, 0.7))
    parts = agreement._reference_gradients(training, exact=True)
    monkeypatch.setattr(agreement, "MICRO_BATCHES", 1)
    whole = agreement._reference_gradients(training, exact=True)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-12)


class Replayed:
    """Stands in for a CUDA graph where there is none: the same weights, its own gradients."""

    def __init__(self, training, pool=None, factor=1.0):
        self.training, self.factor = training, factor
        self.step = training.step

    def fresh_gradients(self):
        return {name: self.factor * gradient for name, gradient in self.training.fresh_gradients().items()}

    def release(self):
        pass


def test_a_replay_is_as_near_to_the_reference_as_the_eager_step():
    training = trained(Variant("sampler", 0.7, precision="bfloat16"))
    assert agreement.check_replay(Replayed(training)).matches
    assert not agreement.check_replay(Replayed(training, factor=1.1)).matches


def test_a_check_leaves_nothing_behind():
    """Neither a sampler that follows every optimizer step nor its gradients for the next one."""
    training = trained(Variant("sampler", 0.7))
    gc.collect()  # samplers of the tests before
    samplers = set(followers)
    assert agreement.check(training).matches
    assert set(followers) == samplers
    assert all(p.grad is None for p in training.model.parameters())


def test_no_model_in_float64_lives_through_the_rounds(monkeypatch):
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
        measurement.measure(WORKLOAD, [Variant("sampler", 0.7)], 1, **SILENT)
    finally:
        gc.enable()


def test_full_sequences_need_no_attention_mask():
    training = Training(WORKLOAD, Variant("dropout"))
    losses = []
    for mask in ({}, {"attention_mask": torch.ones_like(training.batch["input_ids"])}):
        torch.manual_seed(0)
        losses.append(training.model(**training.batch, **mask).loss)
    assert torch.equal(*losses)


def test_every_round_has_one_step_of_each(monkeypatch):
    monkeypatch.setattr(measurement, "peak_bytes", lambda *arguments: 5 << 20)
    variants = [variant for variant in all_variants(("float32",), ("sdpa",)) if variant.mode == "eager"]
    variants = [variant for variant in variants if variant.kind != "triton"]
    said = []
    found = measurement.measure(WORKLOAD, variants, rounds=3, with_memory=True, say=said.append)
    assert [row.variant for row in found] == [variant.name for variant in variants]
    assert all(len(row.samples) == 3 and min(row.samples) > 0 for row in found)
    assert {row.facts["peak_bytes"] for row in found} == {5 << 20}
    assert {row.facts["kind"] for row in found if row.matches} == {"staged", "layers", "sampler", "premix"}
    assert len(said) == 2 * len(variants) + 1  # the memory and the warm-up of each, the rounds


def test_a_variant_that_fails_loses_only_its_row(monkeypatch):
    prepare, step = Variant.prepare, Training.step

    def out_of_memory(variant, model):
        if variant.kind == "plain":
            raise torch.OutOfMemoryError("a model does not fit")
        prepare(variant, model)

    def breaks_in_the_rounds(training):
        if training.variant.kind == "none" and training.optimizer.state and training.broken():
            raise RuntimeError("a step went wrong")
        step(training)

    steps = iter([False] * 4)
    monkeypatch.setattr(Training, "broken", lambda training: next(steps, True), raising=False)
    monkeypatch.setattr(Training, "step", breaks_in_the_rounds)
    monkeypatch.setattr(Variant, "prepare", out_of_memory)
    variants = [Variant("dropout"), Variant("none"), Variant("plain", 0.7), Variant("sampler", 0.7)]
    found = measurement.measure(WORKLOAD, variants, 4, **SILENT)
    assert [row.failure for row in found] == [
        None,
        "RuntimeError: a step went wrong",
        "OutOfMemoryError: a model does not fit",
        None,
    ]
    assert [len(row.samples) for row in found] == [4, 0, 0, 4]
    text = markdown(Run(MACHINE, variants[0].name, found), WORKLOAD)
    assert "- **Not measured:** smallest, plain formula, p=0.7: OutOfMemoryError: a model does not fit" in text
    assert "| plain formula" not in text


def test_peak_memory_of_a_fresh_process():
    """At least weights, gradients and Adam's two moments, and on top of it the targets and Phi."""
    parameters = sum(p.nbytes for p in WORKLOADS["tiny"].model().parameters())
    rows = {v: Row("tiny", v.name, "step") for v in (Variant("sampler", 0.7), Variant("plain", 0.7, "compiled"))}
    measurement._measure_peaks(WORKLOADS["tiny"], rows, lambda text: None)
    sampled, compiled = (row.facts.get("peak_bytes") for row in rows.values())
    assert 4 * parameters < sampled < 40 * parameters
    assert compiled is None


def test_a_graph_trains_the_weights_of_its_eager_row(monkeypatch):
    monkeypatch.setattr(measurement, "Captured", Replayed)
    variants = [Variant("dropout", mode="graph"), Variant("sampler", 0.7, "graph")]
    variants = [*(variant.trained for variant in variants), *variants]
    said = []
    found = measurement.measure(WORKLOAD, variants, 2, with_memory=False, say=said.append)
    assert [row.variant for row in found] == [variant.name for variant in variants]
    assert [row.facts["run"] for row in found] == ["eager", "eager", "graph", "graph"]
    assert [row.matches for row in found] == [None, True, None, True]
    assert said[2:4] == ["dropout 0.1, CUDA graph: warm-up", "mixout_kernels, sampler, p=0.7, CUDA graph: warm-up"]
    assert [row.facts["saved_bytes"] for row in found[:2]] == [row.facts["saved_bytes"] for row in found[2:]]


def test_a_graph_whose_eager_row_fails_says_so(monkeypatch):
    def out_of_memory(variant, model):
        raise torch.OutOfMemoryError("a model does not fit")

    monkeypatch.setattr(measurement, "Captured", Replayed)
    monkeypatch.setattr(Variant, "prepare", out_of_memory)
    eager, graph = measurement.measure(WORKLOAD, [Variant("dropout"), Variant("dropout", mode="graph")], 2, **SILENT)
    assert eager.failure == "OutOfMemoryError: a model does not fit"
    assert graph.failure == "its eager step, whose weights it trains, failed"


def test_groups_are_small_and_have_their_baselines(monkeypatch):
    monkeypatch.setattr(backends.load("cuda"), "unavailable_reason", lambda: None)
    variants = choose(WORKLOADS["bert-large"], _parse(["--device", "cuda"]))
    groups = measurement.groups(variants, 4)
    for group in groups:
        assert len({variant.trained for variant in group}) <= 4
        assert set(group) >= {v for member in group for v in (variants[0], member.dropout_alike, member.trained)}
    assert {variant for group in groups for variant in group} == set(variants)
    others = [variant for group in groups for variant in group if variant.kind != "dropout"]
    assert len(others) == len(set(others))


def names_of(*arguments, workload="minilm"):
    return [variant.name for variant in choose(WORKLOADS[workload], _parse([*arguments]))]


def test_rows_on_a_cpu():
    names = names_of("--device", "cpu")
    assert len(names) == 11
    assert names[:2] == ["dropout 0.1", "torch.compile(dropout 0.1)"]
    assert names[4] == "torch.compile(plain formula), p=0.7"
    assert not [name for name in names if "graph" in name or "premix" in name]
    assert names_of("--device", "cpu", "--quick") == [name for name in names if "compile" not in name]
    low = names_of("--device", "cpu", "--precision", "bfloat16", "--attention", "sdpa", "eager")
    assert low == [name + ", bf16" for name in names] + [name + ", bf16, eager attention" for name in names]
    full = names_of("--device", "cpu", "--full")
    assert len(full) == 4 * 13
    assert full[0] == "dropout 0.1"
    assert "mixout_kernels, sampler, premix=True, p=0.9, bf16, eager attention" in full


def test_tables():
    assert _parse(["--device", "cpu"]).workloads == ("minilm",)
    assert _parse(["--device", "cpu", "--full"]).workloads == ("minilm", "minilm-8x128")
    assert _parse(["--device", "cuda", "--quick"]).workloads == ("tiny-gpu",)


def test_rows_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends.load("cuda"), "unavailable_reason", lambda: None)
    names = names_of("--device", "cuda", workload="bert-large")
    assert "mixout_kernels, sampler, Triton, p=0.7, bf16" in names
    assert names[-1] == "mixout_kernels, sampler, Triton, p=0.7, bf16, CUDA graph"
    monkeypatch.setattr(backends.load("cuda"), "unavailable_reason", lambda: "not built")
    names = names_of("--device", "cuda", workload="bert-large")
    assert not any("Triton" in name for name in names)
    assert names[-4:] == [
        "torch.compile(mixout_kernels, sampler), p=0.7, bf16",
        "dropout 0.1, bf16, CUDA graph",
        "mixout_kernels, sampler, p=0.7, bf16, CUDA graph",
        "mixout_kernels, sampler, p=0.9, bf16, CUDA graph",
    ]
    assert names_of("--device", "cuda", "--only", "9, bf16, CUDA graph", workload="bert-large") == [
        "dropout 0.1, bf16",
        "mixout_kernels, sampler, p=0.9, bf16",
        "dropout 0.1, bf16, CUDA graph",
        "mixout_kernels, sampler, p=0.9, bf16, CUDA graph",
    ]


def row_of(variant, *milliseconds, matches=None):
    facts = {**variant.facts(), "saved_bytes": 1 << 20, "target_bytes": 2 << 20, "mixed_bytes": 0}
    row = Row("smallest", variant.name, "step", [m / 1e3 for m in milliseconds], facts=facts)
    if matches is not None:
        row.judge(Verdict(0.5 if matches else 2.0, "all gradients"))
    return row


def text_of(matches=True):
    dropout, ours = Variant("dropout"), Variant("sampler", 0.7)
    rows = [row_of(dropout, 100, 90, 200), row_of(ours, 70, 60, 500, matches=matches)]
    return markdown(Run(MACHINE, dropout.name, rows), WORKLOAD)


def cells(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_of_medians_and_goals_are_judged_by_them():
    text = text_of()
    assert "p=0.7: 0.700 x dropout run alike, to reach at most 0.75: yes" in text
    name = "mixout_kernels, sampler, p=0.7"
    expected = [name, "yes", "70.0", "65.0 - 285.0", "0.700", "0.700", "-", "1.0", "2.0", "-"]
    assert cells(text, name) == expected


def test_a_wrong_step_gets_no_ratio():
    text = text_of(matches=False)
    assert cells(text, "mixout_kernels, sampler, p=0.7")[1:5] == ["**NO**", "70.0", "65.0 - 285.0", "**wrong**"]
    assert "to reach at most 0.75: **no**" in text


def test_a_step_is_judged_by_dropout_that_is_run_alike():
    dropout, ours = Variant("dropout"), Variant("sampler", 0.7)
    rows = [row_of(dropout, 100), row_of(ours, 90)]
    rows += [row_of(dataclasses.replace(v, mode="graph"), m) for v, m in ((dropout, 50), (ours, 30))]
    rows += [row_of(dataclasses.replace(v, precision="bfloat16"), m) for v, m in ((dropout, 60), (ours, 48))]
    run = Run(MACHINE, dropout.name, rows)
    text = markdown(run, dataclasses.replace(WORKLOAD, device="cuda"))
    name = "mixout_kernels, sampler, p=0.7"
    assert f"- {name}: 0.900 x dropout run alike, to reach at most 0.75: **no**" in text
    assert f"- {name}, CUDA graph: 0.600 x dropout run alike, to reach at most 0.75: yes" in text
    assert cells(text, name)[4:6] == ["0.900", "0.900"]
    assert cells(text, f"{name}, CUDA graph")[4:6] == ["0.300", "0.600"]
    assert cells(text, f"{name}, bf16")[4:6] == ["0.480", "0.800"]
    figure = draw(run, WORKLOAD)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row.variant for row in rows]


def lines_of(path):
    with path.open() as file:
        return {line["variant"]: line for line in csv.DictReader(file)}


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny", dataclasses.replace(WORKLOAD, name="tiny"))
    options = ["--quick", "--rounds", "2", "--only", "sampler", "--output", str(tmp_path), "--device", "cpu"]
    assert main(options) == 0
    lines = lines_of(tmp_path / "tiny.csv")
    assert list(lines) == ["dropout 0.1", "mixout_kernels, sampler, p=0.7", "mixout_kernels, sampler, p=0.9"]
    assert all(line["rounds"] == "2" and float(line["ratio"]) > 0 for line in lines.values())
    assert (tmp_path / "tiny.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_errors(capsys):
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds: expected 1 or more, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--workloads", "bert-large", "--device", "cpu"])
    assert "--workloads: bert-large is for --device cuda" in capsys.readouterr().err


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: steps on a GPU, and CUDA graphs")


@needs_gpu
def test_command_on_a_gpu(tmp_path):
    assert main(["--quick", "--rounds", "2", "--output", str(tmp_path), "--device", "cuda"]) == 0
    lines = lines_of(tmp_path / "tiny-gpu.csv")
    assert list(lines) == names_of("--device", "cuda", "--quick", workload="tiny-gpu")
    graphs = [line for line in lines.values() if line["run"] == "graph"]
    assert {line["matches_reference"] for line in graphs if line["kind"] != "dropout"} == {"True"}
    for line in lines.values():
        assert line["rounds"] == "2"
        if line["run"] == "eager":
            assert int(line["launches"]) > 100
            assert int(line["peak_bytes"]) > int(lines["dropout 0.1, bf16"]["saved_bytes"])


@needs_gpu
def test_compiled_steps_on_a_gpu():
    variants = [variant for variant in all_variants(("bfloat16",), ("sdpa",)) if variant.mode == "compiled"]
    found = measurement.measure(WORKLOADS["tiny-gpu"], variants, 1, **SILENT)
    assert [row.matches for row in found if row.facts["kind"] == "sampler"] == [True]
    assert all(row.facts["launches"] > 10 for row in found)


@needs_gpu
def test_replays_and_eager_steps_take_turns():
    training = trained(Variant("sampler", 0.7, precision="bfloat16"), workload=WORKLOADS["tiny-gpu"])
    captured = Captured(training, torch.cuda.graph_pool_handle())
    weight = training.model.bert.pooler.dense.weight
    for _ in range(3):
        step, before = training.sampler.step, weight.detach().clone()
        captured.step()
        assert training.sampler.step == step + 1
        assert not torch.equal(weight, before)
        assert agreement.check_replay(captured).matches
        training.step()
        assert agreement.check(training).matches
