"""apply_mixout and remove_mixout on models: what is swapped, what is kept, what comes back."""

import pytest
import torch
from torch import nn

import mixout_kernels as mk

from . import axes


class Encoder(nn.Module):
    """Two blocks, an attention, an embedding, dropouts of three kinds, and a head that is not pretrained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(8, 8), "output": nn.Linear(8, 8, bias=False), "dropout": nn.Dropout(0.1)})
            for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.spatial = nn.Dropout1d(0.2)
        self.off = nn.Dropout(0.0)
        self.attention_dropout = 0.15
        self.classifier = nn.Linear(8, 2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block["dropout"](block["output"](block["query"](x)))
        x = self.spatial(self.attention(x, x, x, need_weights=False)[0])
        x = nn.functional.dropout(x, self.attention_dropout, self.training)
        return self.classifier(self.off(x))


MIXED = {f"blocks.{i}.{name}" for i in range(2) for name in ("query", "output")}


def state_of(model):
    """Everything that apply_mixout may not change when it raises."""
    return (
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
        [
            (name, {key: value for key, value in vars(module).items() if isinstance(value, (float, bool, str))})
            for name, module in model.named_modules()
        ],
    )


def assert_unchanged(model, before):
    after = state_of(model)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert after[1].keys() == before[1].keys()
    for name, (identity, value) in before[1].items():
        assert after[1][name][0] == identity
        assert torch.equal(after[1][name][1], value)


def mixed_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, (mk.MixLinear, mk.MixConv1D))}


@axes.masks
def test_swaps_every_pretrained_linear_in_place(mask):
    model = Encoder()
    parameters = dict(model.named_parameters())
    report = mk.apply_mixout(model, p=0.7, mask=mask)
    assert mixed_names(model) == MIXED == set(report.mixed)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for name in MIXED:
        module = model.get_submodule(name)
        assert module.p == 0.7
        assert module.mask == mask
        assert torch.equal(module.target, module.weight)
        assert module.target.data_ptr() != module.weight.data_ptr()


def test_report_lists_every_module_with_what_was_done():
    model = Encoder()
    report = mk.apply_mixout(model, p=0.7)
    assert report.p == 0.7
    assert report.mask == "neuron"
    assert report.mixed["blocks.0.query"] == "MixLinear [8, 8], p=0.7"
    assert report.skipped == {
        "attention.out_proj": "nn.MultiheadAttention reads its weight itself, without its forward",
        "classifier": "excluded by 'classifier': new, by its name",
        "embedding.weight": "Embedding, a Parameter [11, 8]: mixout() mixes it where it is read",
        "attention.in_proj_weight": "MultiheadAttention, a Parameter [24, 8]: mixout() mixes it where it is read",
    }
    assert report.dropout == {
        "": "attention_dropout 0.15 -> 0",
        "blocks.0.dropout": "p 0.1 -> 0",
        "blocks.1.dropout": "p 0.1 -> 0",
        "attention": "dropout 0.3 -> 0",
        "spatial": "p 0.2 -> 0",
    }
    assert report.target_bytes == 4 * 8 * 8 * 4
    text = str(report)
    assert text.startswith("mixout p=0.7, mask='neuron': 4 mixed, 4 skipped, 5 dropout rates set to 0")
    for name in (*report.mixed, *report.skipped, "(the model)", "blocks.1.dropout"):
        assert name in text


def test_a_tied_embedding_is_listed():
    """One Parameter is mixed where the linear layer reads it, and not where the embedding does."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "output": nn.Linear(3, 5, bias=False)})
    model["output"].weight = model["embedding"].weight
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"output"}
    tied = "Embedding, a Parameter [5, 3]: tied to 'output', and read here as it is"
    assert report.skipped == {"embedding.weight": tied}


def test_output_before_training_is_the_pretrained_one(device):
    """w = u: whatever the mask, Phi is w. So the first training forward equals the model without dropout."""
    model = Encoder().to(device)
    tokens = torch.randint(11, (3, 5), device=device)
    expected = model.eval()(tokens)
    mk.apply_mixout(model, p=0.7)
    torch.testing.assert_close(model.train()(tokens), expected)
    torch.testing.assert_close(model.eval()(tokens), expected)


def test_remove_is_the_inverse():
    model = Encoder()
    before = [(name, type(module)) for name, module in model.named_modules()]
    rates = [(name, vars(m).get("p"), vars(m).get("dropout")) for name, m in model.named_modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    buffers = set(dict(model.named_buffers()))
    parameters = dict(model.named_parameters())
    tokens = torch.randint(11, (3, 5))
    torch.manual_seed(1)
    expected = model(tokens)

    mk.apply_mixout(model, p=0.7)
    assert model.spatial.p == model.attention.dropout == model.attention_dropout == 0.0
    mk.remove_mixout(model)

    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [(name, vars(m).get("p"), vars(m).get("dropout")) for name, m in model.named_modules()] == rates
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert set(dict(model.named_buffers())) == buffers
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    torch.manual_seed(1)
    assert torch.equal(model(tokens), expected)


def test_remove_keeps_trained_weights():
    model = Encoder()
    mk.apply_mixout(model, p=0.7)
    with torch.no_grad():
        model.blocks[0]["query"].weight.add_(1)
    weight = model.blocks[0]["query"].weight.clone()
    mk.remove_mixout(model)
    assert torch.equal(model.blocks[0]["query"].weight, weight)
    mk.apply_mixout(model, p=0.7)  # and again, from the new weights
    assert torch.equal(model.blocks[0]["query"].target, weight)


def test_dropout_can_stay():
    model = Encoder()
    report = mk.apply_mixout(model, p=0.7, disable_dropout=False)
    assert report.dropout == {}
    assert model.spatial.p == 0.2
    assert model.attention.dropout == 0.3
    mk.remove_mixout(model)
    assert model.spatial.p == 0.2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["query"]}, {"blocks.0.query", "blocks.1.query"}),
        ({"include": ["blocks.1.*"]}, {"blocks.1.query", "blocks.1.output"}),
        ({"include": ["blocks.?.out*"]}, {"blocks.0.output", "blocks.1.output"}),
        ({"include": ["quer[xyz]", "classifier"], "exclude": []}, {"blocks.0.query", "blocks.1.query", "classifier"}),
        ({"exclude": ()}, MIXED | {"classifier"}),
        ({"exclude": ["output", "classifier"]}, {"blocks.0.query", "blocks.1.query"}),
        ({"exclude": ["blocks.0.*", "classifier"]}, {"blocks.1.query", "blocks.1.output"}),
        ({"include": (name for name in ["query"])}, {"blocks.0.query", "blocks.1.query"}),
    ],
    ids=str,
)
def test_include_and_exclude(options, expected):
    model = Encoder()
    report = mk.apply_mixout(model, p=0.5, **options)
    assert mixed_names(model) == expected == set(report.mixed)
    linears = MIXED | {"classifier", "attention.out_proj"}
    assert set(report.skipped) == linears - expected | {"attention.in_proj_weight", "embedding.weight"}


def test_not_included_is_said():
    report = mk.apply_mixout(Encoder(), p=0.5, include=["query"])
    assert report.skipped["blocks.0.output"] == report.skipped["classifier"] == "not included"


@pytest.mark.parametrize("include", [["classifier"], []], ids=str)
def test_nothing_matched_raises_and_changes_nothing(include):
    model = Encoder()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"apply_mixout: nothing to mix: .*got 6 linear layers: .*blocks\.0\.query"):
        mk.apply_mixout(model, p=0.5, include=include)
    assert_unchanged(model, before)


def test_a_model_without_linears_raises():
    with pytest.raises(ValueError, match=r"nothing to mix: .*got 0 linear layers: none"):
        mk.apply_mixout(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.1)), p=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 1.5}, ValueError, r"p: expected a number in \[0, 1\], got 1.5"),
        ({"p": "0.5"}, TypeError, "p: expected a number"),
        ({"p": 0.5, "mask": "row"}, ValueError, "mask: expected one of 'neuron', 'weight', .*, got 'row'"),
        ({"p": 0.5, "include": "query"}, TypeError, "include: expected a list of patterns, got the string 'query'"),
        ({"p": 0.5, "exclude": "query"}, TypeError, "exclude: expected a list of patterns, got the string 'query'"),
        ({"p": 0.5, "exclude": 5}, TypeError, "exclude: expected a list of patterns, got 5"),
        ({"p": 0.5, "include": [1]}, TypeError, r"include: expected a list of patterns, got \[1\]"),
        ({"p": 0.5, "targets": {}}, ValueError, "targets: expected pretrained parameters, got a dict with none"),
        ({"p": 0.5, "targets": 5}, TypeError, "targets: expected a state_dict, a model or a path, got int"),
        (
            {"p": 0.5, "target_dtype": "bfloat16"},
            TypeError,
            "target_dtype: expected a torch.dtype or None, got 'bfloat",
        ),
    ],
    ids=str,
)
def test_bad_arguments_raise_and_change_nothing(options, error, message):
    model = Encoder()
    before = state_of(model)
    with pytest.raises(error, match=f"apply_mixout: {message}"):
        mk.apply_mixout(model, **options)
    assert_unchanged(model, before)


def test_twice_raises_and_changes_nothing():
    model = Encoder()
    mk.apply_mixout(model, p=0.5, include=["query"])
    before = state_of(model)
    with pytest.raises(ValueError, match="expected one without mixout; call remove_mixout"):
        mk.apply_mixout(model, p=0.5)
    assert_unchanged(model, before)


@pytest.mark.parametrize("exclude", [(), ("blocks.0.*",)], ids=str)
def test_targets_must_have_what_a_list_of_exclusions_lets_through(exclude):
    """A resumed run would else train a head without the mixout that it had."""
    model, pretrained = Encoder(), Encoder()
    before, targets = state_of(model), pretrained.state_dict()
    head = targets.pop("classifier.weight")
    with pytest.raises(
        ValueError, match=r"apply_mixout: targets: expected an entry for 'classifier\.weight', which ex"
    ):
        mk.apply_mixout(model, p=0.5, targets=targets, exclude=exclude)
    assert_unchanged(model, before)
    assert "classifier" not in mk.apply_mixout(Encoder(), p=0.5, targets=targets).mixed
    mk.apply_mixout(model, p=0.5, targets={**targets, "classifier.weight": head}, exclude=exclude)
    assert torch.equal(model.classifier.target, head)


@pytest.mark.parametrize("prepare", ["p of zero", "fixed columns"])
def test_a_layer_of_this_package_takes_the_mask_that_is_asked_for(prepare):
    model = nn.Sequential(nn.Linear(4, 4))
    if prepare == "fixed columns":
        mk.apply_graddrop(model, keep={"0.weight": torch.tensor([True, False, True, False])})
    else:
        model[0] = mk.MixLinear(4, 4, p=0.0)
    mk.apply_mixout(model, p=0.5, mask="weight")
    assert (model[0].p, model[0].mask) == (0.5, "weight")


def test_a_layer_by_itself():
    layer = nn.Linear(4, 4)
    report = mk.apply_mixout(layer, p=0.5)
    assert isinstance(layer, mk.MixLinear)
    assert "(the model)" in str(report)
    mk.remove_mixout(layer)
    assert type(layer) is nn.Linear
    with pytest.raises(TypeError, match=r"^apply_mixout: model: expected an nn.Module, got str$"):
        mk.apply_mixout("bert", p=0.5)


def test_remove_without_mixout_raises():
    with pytest.raises(ValueError, match="remove_mixout: model: expected one with MixLinear or MixConv1D"):
        mk.remove_mixout(Encoder())


def test_checkpoints_load_both_ways():
    plain, mixed = Encoder(), Encoder()
    mk.apply_mixout(mixed, p=0.5)
    assert list(mixed.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    mixed.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(mixed.state_dict(), strict=True)


def test_a_computed_weight_is_skipped():
    """torch.nn.utils.weight_norm and spectral_norm write ``weight`` in a pre-forward hook: it is no Parameter."""
    model = nn.ModuleDict({"normed": torch.nn.utils.spectral_norm(nn.Linear(4, 4)), "plain": nn.Linear(4, 4)})
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"plain"}
    assert report.skipped == {"normed": "its weight is computed, not a Parameter"}


def test_a_lazy_layer_is_skipped():
    report = mk.apply_mixout(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2), nn.LazyConv1d(2, 2)), p=0.5)
    assert set(report.mixed) == {"0"}
    assert report.skipped == {"1": "lazy: its weight has no shape before the first forward"}


def test_multihead_attention_is_left_alone():
    """Its forward reads in_proj_weight and out_proj.weight itself: a swapped out_proj would silently do nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"linear1", "linear2"}
    assert set(report.skipped) == {"self_attn.out_proj", "self_attn.in_proj_weight"}
    assert isinstance(model.self_attn.out_proj, nn.Linear)
    assert not mixed_names(model.self_attn)
    x = torch.randn(2, 3, 8)
    expected = model.eval()(x)
    torch.testing.assert_close(model.train()(x), expected)


def test_transformer_encoder_layer_uses_its_mixed_weights_in_training():
    """Its eval-mode fast path reads linear1.weight directly, which is right there; training must call the module."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mk.apply_mixout(model, p=0.5)
    with torch.no_grad():
        model.linear1.weight.add_(1)
    x = torch.randn(2, 3, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_a_model_from_the_meta_device_needs_other_targets():
    """``to_empty`` gives its targets no values, as it gives its weights any: nothing mixes with them."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    mk.apply_mixout(model, p=0.5)
    model.to_empty(device="cpu").half()
    with pytest.raises(RuntimeError, match=r"^MixLinear: target: expected one with values, got one on the meta device"):
        model(torch.ones(1, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"^MixSampler: model: expected the target of '0' in memory on every rank"):
        mk.MixSampler(model)


def test_targets_that_are_given_to_a_model_on_the_meta_device():
    """They outlive ``to_empty``, and go where the weights have gone."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
    pretrained = {"0.weight": torch.arange(16.0).reshape(4, 4)}
    mk.apply_mixout(model, p=1.0, targets=pretrained)
    model.to_empty(device="cpu")
    model.load_state_dict({"0.weight": torch.zeros(4, 4)})
    assert torch.equal(model(torch.eye(4)), pretrained["0.weight"].t())
    assert torch.equal(model.double()[0].target, pretrained["0.weight"].double())


def test_a_weight_that_is_partitioned_already_is_refused():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].weight.data = torch.empty(0)  # what deepspeed.zero.Init leaves on a rank
    with pytest.raises(ValueError, match=r"^apply_mixout: model: expected weights of two dimensions, got \[0\] in '0'"):
        mk.apply_mixout(model, p=0.5, exclude=())
    assert type(model[0]) is nn.Linear
