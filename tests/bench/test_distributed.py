"""The benchmark of two ranks: its arithmetic against real shapes, its report, and a run of it where it can be run."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

import mixout_kernels as mk
from benchmarks.common.errors import CommandError
from benchmarks.common.rows import Row, Run
from benchmarks.distributed import __main__ as command
from benchmarks.distributed import traffic
from benchmarks.distributed.measurement import measure
from benchmarks.distributed.methods import ENGINES, MODELS, methods
from benchmarks.distributed.network import LINKS, network
from benchmarks.distributed.report import draw, markdown


def bert(hidden, inner, layers):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return AutoModel.from_config(BertConfig(**sizes, num_attention_heads=hidden // 64))


def llama(inner, vocabulary, key_value_heads):
    sizes = {"hidden_size": 4096, "intermediate_size": inner, "num_hidden_layers": 32, "vocab_size": vocabulary}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=key_value_heads))


REAL = {
    "MiniLM-L6-H384": lambda: bert(384, 1536, 6),
    "BERT-large": lambda: bert(1024, 4096, 24),
    "Llama-2-7B": lambda: llama(11008, 32000, 32),
    "Llama-3-8B": lambda: llama(14336, 128256, 8),
}


@pytest.mark.parametrize("shapes", traffic.MODELS, ids=lambda shapes: shapes.name)
def test_shapes_are_those_of_the_models(shapes):
    with torch.device("meta"):
        model = REAL[shapes.name]()
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert sorted(tuple(layer.weight.shape) for layer in layers) == sorted(shapes.mixed)
    assert sum(parameter.numel() for parameter in model.parameters()) == shapes.total


def test_what_is_sent_by_shapes():
    shapes = traffic.Shapes("two layers", [(4, 100), (6, 50)], 300)
    assert shapes.total == 1000
    assert shapes.kept(traffic.exact, 0.9) == pytest.approx((40 + 30 + 300) / 1000)
    assert "| two layers, 2 bytes a number, 4 GPUs: 0.0 GB of weights |" in traffic.example(shapes, 4, 2)
    text = traffic.tables()
    assert all(text.count(model.name) >= 2 for model in traffic.MODELS)


def test_methods_name_each_other():
    for engine in ENGINES:
        names = [one.name for one in methods() if one.engine == engine]
        assert len(set(names)) == len(names)
        assert names[0] == "dropout"
        assert {one.baseline for one in methods() if one.engine == engine} <= set(names)
        assert {one.same_as for one in methods() if one.engine == engine} <= {None, *names}
    assert {link for one in methods() for link in one.goals} <= {link.name for link in LINKS}


def test_the_report():
    machine = {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0123456789ab"}
    facts = {"sent_bytes": 2e6, "target_bytes": 1e6}
    rows = [
        Row(link.name, one.name, one.engine, [0.1 + 0.01 * number] * 3, facts=dict(facts))
        for link in LINKS
        for number, one in enumerate(methods())
    ]
    rows[-1].samples, rows[-1].failure = (), "ValueError: no"
    run = Run(machine, "dropout", rows)
    text = markdown(run, MODELS["tiny"], methods())
    assert all(f"[start:{name}]" in text and f"[end:{name}]" in text for name in (*ENGINES, "shapes"))
    assert "- **Not measured:** unlimited, " in text
    assert "ValueError: no" in text
    assert "| mixout, p=0.7, all sent " in text
    assert "to reach at most 0.46: **no**" in text
    draw(run, MODELS["tiny"], methods())


def test_without_a_network_it_says_so_and_calculates(monkeypatch, capsys):
    def refuse(*arguments):
        raise CommandError("not root")

    monkeypatch.setattr(command, "measure", refuse)
    assert command.main(["--quick"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("SKIPPED, NOTHING IS MEASURED HERE: not root")
    assert "Llama-3-8B" in said.out


def test_a_run():
    try:
        with network() as made:
            assert len(made.namespaces) == 2
    except CommandError as error:
        pytest.skip(f"NO NETWORK NAMESPACES HERE: {error}")
    chosen = [one for one in methods() if one.engine == "DDP"]
    rows = {row.variant: row for row in measure("tiny", chosen, LINKS[-1:], 2, lambda text: None)}
    assert {name: row.failure for name, row in rows.items() if row.failure} == {}
    assert [row.variant for row in rows.values()] == [one.name for one in chosen]
    assert all(len(row.samples) == 2 for row in rows.values())
    assert all(row.matches is (True if one.same_as else None) for one, row in zip(chosen, rows.values(), strict=True))
    model = MODELS["tiny"].make()
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    mixed = mk.apply_mixout(model, p=0.7)
    targets = sum(model.get_submodule(name).target.nbytes for name in mixed.mixed)
    assert rows["mixout, p=0.7, all sent"].facts["target_bytes"] == targets
    # Headers, acknowledgements and barriers are beside the gradients.
    assert gradients < rows["mixout, p=0.7, all sent"].facts["sent_bytes"] < 1.2 * gradients
    kept = rows["mixout, p=0.7, kept columns, buckets of 8 MB"].facts["sent_bytes"]
    assert gradients - targets < kept < gradients - 0.5 * targets
    assert rows["mixout, p=0.7, no communication"].facts["sent_bytes"] < 0.05 * gradients
