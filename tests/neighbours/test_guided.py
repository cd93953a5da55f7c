"""Guided dropout: rates by rank, by name, on several architectures."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mixout_kernels as mk

from .models import albert, bert, deberta, gpt2, llama, padded_batch, roberta, t5, vit


def approx(rates):
    return pytest.approx(rates, rel=0, abs=1e-12)


def test_rates_of_the_paper():
    scores = {"e": 6e-3, "0.attn": 1e-4, "0.out": 3e-3, "1.attn": 2e-4, "1.out": 9e-4}
    rates = mk.guided_rates(scores, upper=0.1)
    assert rates == approx({"e": 0, "0.attn": 0.1, "0.out": 0.025, "1.attn": 0.075, "1.out": 0.05})
    assert list(rates) == list(scores)


def test_rates_of_the_papers_code():
    rates = mk.guided_rates({str(r): float(r) for r in range(37)}, upper=0.099)
    assert rates == approx({str(r): 0.099 - 0.00275 * r for r in range(37)})


def test_ties_keep_the_order_given():
    assert mk.guided_rates({"a": 1, "b": 1, "c": 0}) == approx({"a": 0.05, "b": 0, "c": 0.1})
    assert mk.guided_rates({"alone": 3.0}, upper=0.2, lower=0.1) == {"alone": 0.2}


@given(
    scores=st.lists(st.floats(0, 1e6), min_size=2, max_size=30),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_a_higher_score_never_gets_a_higher_rate(scores, bounds):
    lower, upper = bounds
    rates = mk.guided_rates(dict(enumerate(scores)), upper=upper, lower=lower)
    in_order = [rates[i] for i in sorted(rates, key=lambda i: scores[i])]
    assert in_order == sorted(in_order, reverse=True)
    assert in_order[0] == upper
    assert in_order[-1] == pytest.approx(lower, abs=1e-12)


def test_guided_rates_errors():
    with pytest.raises(ValueError, match=r"guided_rates: upper: expected a number in \[0, 1\], got 1.5"):
        mk.guided_rates({"a": 1}, upper=1.5)
    with pytest.raises(ValueError, match=r"guided_rates: lower: expected a number in \[0, 1\], got nan"):
        mk.guided_rates({"a": 1}, lower=float("nan"))
    with pytest.raises(ValueError, match=r"guided_rates: lower: expected a number <= upper = 0.1, got 0.2"):
        mk.guided_rates({"a": 1}, lower=0.2)
    with pytest.raises(ValueError, match=r"guided_rates: scores: expected one or more, got none"):
        mk.guided_rates({})
    with pytest.raises(ValueError, match=r"guided_rates: scores: expected numbers, got nan for 'b'"):
        mk.guided_rates({"a": 1, "b": float("nan")})


def test_a_layers_score_is_the_mean_of_its_tensors_means():
    fisher = {"x.attention.weight": torch.full((100, 100), 1e-4), "x.attention.bias": torch.full((100,), 3e-4)}
    assert mk.layer_scores(fisher, "attention") == {"x.attention": pytest.approx(2e-4)}
    means = {name: tensor.mean() for name, tensor in fisher.items()}
    assert mk.layer_scores(means, "attention") == {"x.attention": pytest.approx(2e-4)}


def test_layers_by_the_end_of_their_names():
    fisher = {name: torch.tensor(1.0) for name, _ in bert().named_parameters()}
    blocks = [f"bert.encoder.layer.{i}" for i in range(2)]
    assert list(mk.layer_scores(fisher, "attention.self")) == [f"{block}.attention.self.*" for block in blocks]
    assert list(mk.layer_scores(fisher, "layer.*")) == [f"{block}.*" for block in blocks]
    both = mk.layer_scores(fisher, "attention", "layer.*")  # the first pattern that a parameter has
    assert list(both) == [f"{b}.{part}" for b in blocks for part in ("attention.*", "*")]
    assert set(mk.layer_scores(fisher)) == {name.rpartition(".")[0] for name in fisher}
    with pytest.raises(ValueError, match=r"layer_scores: layers: expected patterns that match, got 'attn', which"):
        mk.layer_scores(fisher, "attention", "attn")
    with pytest.raises(ValueError, match=r"layer_scores: fisher: expected the Fisher information of one parameter"):
        mk.layer_scores({}, "attention")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.inner = nn.ModuleDict({"out": nn.Linear(4, 4)})


@pytest.mark.parametrize(("make", "layers"), [(Small, ()), (Small, ("enc", "out")), (bert, ()), (bert, ("query",))])
def test_mixout_takes_the_rates_of_linear_layers(make, layers):
    model = make()
    scores = mk.layer_scores(counted(model), *layers, model=model)
    rates = mk.guided_rates(scores, upper=0.9, lower=0.5)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (not layers or name.rpartition(".")[2] in layers)
    }
    assert set(scores) == linear
    report = mk.apply_mixout(model, p=rates, exclude=())
    assert report.rates == rates  # also where the name of one layer, "out", is a part of another's


def test_layers_that_hold_linear_layers():
    model = bert()
    scores = mk.layer_scores(counted(model), "attention.self", "intermediate", "LayerNorm", model=model)
    blocks = [f"bert.encoder.layer.{i}" for i in range(2)]
    assert list(scores) == [f"{block}.{part}.*" for block in blocks for part in ("attention.self", "intermediate")]
    assert len(mk.apply_mixout(model, p=mk.guided_rates(scores)).mixed) == 8


def test_layer_scores_of_a_model_without_such_layers():
    with pytest.raises(
        ValueError, match=r"layer_scores: model: expected one with linear layers among .* in inner.out, enc, norm"
    ):
        mk.layer_scores(counted(Small()), model=nn.LayerNorm(4))
    with pytest.raises(TypeError, match=r"layer_scores: model: expected an nn.Module or None, got str"):
        mk.layer_scores(counted(Small()), model="enc")


def counted(model):
    """As Fisher information: the position of each parameter, so that scores are known and rise through the model."""
    return {name: torch.tensor(float(i)) for i, (name, _) in enumerate(model.named_parameters())}


def names(pattern, *parts):
    """The pattern with each number of a block and each part, in this order."""
    return [pattern.format(i, part) for i in (0, 1) for part in parts]


BERT = ("attention.self", "attention.output", "output")
DEBERTA = ("attention.self.pos_", "attention.self.", "attention.output.", "output.")
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
T5 = ("0.SelfAttention", "1.DenseReluDense"), ("0.SelfAttention", "1.EncDecAttention", "2.DenseReluDense")

GUIDED = {  # (the model, the dropouts that get a rate, those that are left alone), both in the order of the model
    "bert": (bert, ["bert.embeddings.dropout", *names("bert.encoder.layer.{}.{}.dropout", *BERT)], ["dropout"]),
    "roberta": (
        roberta,
        ["roberta.embeddings.dropout", *names("roberta.encoder.layer.{}.{}.dropout", *BERT)],
        ["classifier.dropout"],
    ),
    "deberta": (
        deberta,
        ["deberta.embeddings.dropout", *names("deberta.encoder.layer.{}.{}dropout", *DEBERTA), "pooler.dropout"],
        ["dropout"],
    ),
    "albert": (
        albert,
        ["albert.embeddings.dropout", *(f"{ALBERT}.attention.{part}_dropout" for part in ("attention", "output"))],
        [f"{ALBERT}.dropout", "dropout"],
    ),
    "gpt2": (
        gpt2,
        names("transformer.h.{}.{}dropout", "attn.attn_", "attn.resid_", "mlp."),
        ["transformer.drop"],
    ),
    "t5": (
        t5,
        names("encoder.block.{}.layer.{}.dropout", *T5[0]) + names("decoder.block.{}.layer.{}.dropout", *T5[1]),
        None,
    ),
    "vit": (
        vit,
        ["vit.embeddings.dropout", *names("vit.layers.{}.{}", "attention.attention_dropout")],
        ["vit.layers.0.dropout", "vit.layers.1.dropout"],
    ),
}


def rate_of(model, name):
    parent, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(parent), attribute)
    return found.p if isinstance(found, nn.Dropout) else found


@pytest.mark.parametrize("architecture", GUIDED)
def test_by_name(architecture):
    make, guided, skipped = GUIDED[architecture]
    model = make()
    before = {name: rate_of(model, name) for name in guided}
    report = mk.apply_guided_dropout(model, counted(model), upper=0.12)
    assert list(report.rates) == guided
    if skipped is not None:
        assert list(report.skipped) == skipped
    scores = {}
    for name in guided:
        layer = name.rpartition(".")[0]
        places = [i for i, (parameter, _) in enumerate(model.named_parameters()) if parameter.startswith(f"{layer}.")]
        scores[name] = sum(places) / len(places)
    assert {name: rate_of(model, name) for name in guided} == approx(mk.guided_rates(scores, upper=0.12))
    assert all(name in str(report) for name in [*guided, *report.skipped])
    mk.remove_guided_dropout(model)
    assert {name: rate_of(model, name) for name in guided} == before


def test_what_holds_another_layer_is_left_alone_and_said():
    report = mk.apply_guided_dropout(gpt2(), counted(gpt2()))
    assert report.skipped["transformer.drop"].startswith("transformer also holds transformer.h.0.attn, which has")


def test_from_the_fisher_information_of_the_model():
    """The paper's ranking needs its data; here the highest score gets the rate 0, whatever it is."""
    model, batch = bert(), padded_batch()
    fisher = mk.fisher(model, [batch], mean=True)
    report = mk.apply_guided_dropout(model, fisher)
    highest = max(mk.layer_scores(fisher, "embeddings", "self", "output").items(), key=lambda item: item[1])[0]
    assert rate_of(model, highest.replace("*", "dropout")) == pytest.approx(0, abs=1e-12)
    assert len(report.rates) == 7


def test_the_names_of_a_base_model_will_do():
    model = bert()
    fisher = counted(model)
    expected = mk.apply_guided_dropout(model, fisher).rates
    base = {name.removeprefix("bert."): score for name, score in fisher.items()}
    assert mk.apply_guided_dropout(bert(), base).rates == expected
    found = mk.apply_guided_dropout(bert().bert, fisher, exclude=()).rates
    assert {f"bert.{name}": rate for name, rate in found.items()} == expected


def test_a_part_of_the_fisher_information():
    model = bert()
    fisher = {name: score for name, score in counted(model).items() if "layer.1" in name}
    report = mk.apply_guided_dropout(model, fisher)
    assert len(report.rates) == 3
    assert report.skipped["bert.embeddings.dropout"] == "no Fisher information of its layer's parameters"
    assert rate_of(model, "bert.embeddings.dropout") == 0.1


def test_a_rate_that_was_changed_since_stays():
    model = bert()
    mk.apply_guided_dropout(model, counted(model))
    model.bert.embeddings.dropout.p = 0.33
    mk.remove_guided_dropout(model)
    assert model.bert.embeddings.dropout.p == 0.33
    assert model.bert.encoder.layer[0].output.dropout.p == 0.1


@pytest.mark.parametrize("applied", [("mixout", "guided"), ("guided", "mixout")], ids=str)
@pytest.mark.parametrize("removed", [("mixout", "guided"), ("guided", "mixout")], ids=str)
@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_beside_mixout_the_last_to_be_removed_restores_the_rates(applied, removed, duplicate):
    def rates(model):
        return [(vars(module).get("p"), type(getattr(module, "config", None))) for module in model.modules()]

    model = bert()
    before = rates(model)
    apply = {
        "mixout": lambda: mk.apply_mixout(model, p=0.5),
        "guided": lambda: mk.apply_guided_dropout(model, counted(model)),
    }
    for name in applied:
        apply[name]()
    assert rates(model) != before
    if duplicate is not None:
        model = duplicate(model)
    for name in removed:
        {"mixout": mk.remove_mixout, "guided": mk.remove_guided_dropout}[name](model)
    assert rates(model) == before
    assert not any("_dropout_changes" in vars(module) for module in model.modules())


def test_guided_dropout_errors():
    model = llama()
    with pytest.raises(ValueError, match=r"apply_guided_dropout: nothing to guide: .*, got no dropout at all"):
        mk.apply_guided_dropout(model, counted(model))
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"nothing to guide: .*, got 1 \(it belongs to the whole model\)"):
        mk.apply_guided_dropout(model, counted(model))
    model = bert()
    with pytest.raises(ValueError, match=r"nothing to guide: .* \(no Fisher information of its layer's parameters\)"):
        mk.apply_guided_dropout(model, {"other": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"remove_guided_dropout: model: expected one with guided dropout, got none"):
        mk.remove_guided_dropout(model)
    with pytest.raises(
        ValueError, match=r"apply_guided_dropout: exclude: expected patterns that match a dropout .* 'zz'"
    ):
        mk.apply_guided_dropout(model, counted(model), exclude=["zz"])
    mk.apply_guided_dropout(model, counted(model))
    with pytest.raises(ValueError, match=r"expected one without guided dropout; call remove_guided_dropout\(model\)"):
        mk.apply_guided_dropout(model, counted(model))
    with pytest.raises(TypeError, match=r"apply_guided_dropout: model: expected an nn.Module, got dict"):
        mk.apply_guided_dropout({}, {})
