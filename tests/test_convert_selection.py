"""Which layers are mixed, with which p, by what evidence; and the reason against every other one."""

import re
import time
from typing import NamedTuple

import pytest
import torch
from torch import nn

import mixout_kernels as mk


class Block(nn.Module):
    def __init__(self, dropout=None):
        super().__init__()
        self.query, self.output = nn.Linear(8, 8), nn.Linear(8, 8)
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.output(self.query(x))


def net(blocks=2, **options):
    torch.manual_seed(1)
    body = nn.Sequential(*(Block(**options) for _ in range(blocks)))
    return nn.ModuleDict({"body": body, "classifier": nn.Linear(8, 2)})


BODY = {f"body.{i}.{name}" for i in range(2) for name in ("query", "output")}

# --- p for each layer -------------------------------------------------------------------------------------------------


def test_the_first_matching_pattern_gives_p():
    model = net()
    report = mk.apply_mixout(model, p={"body.0.query": 0.1, "query": 0.3, "body.1.*": 0.5})
    rates = {"body.0.query": 0.1, "body.1.query": 0.3, "body.1.output": 0.5}
    assert report.rates == rates
    assert {name: model.get_submodule(name).p for name in rates} == rates
    assert report.skipped["body.0.output"] == "no pattern of p matches it"
    assert report.mixed["body.1.query"] == "MixLinear [8, 8], p=0.3"
    assert [row.p for row in report.rows() if row.what == "mixed"] == list(report.rates.values())


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ({"body.*": 0.5, "qeury": 0.3}, "got 'qeury': it matches no linear layer of the model"),
        ({"body.*": 0.5, "query": 0.3}, "got 'query': it matches only layers that an earlier pattern has taken"),
    ],
    ids=["typo", "shadowed"],
)
def test_a_pattern_of_p_that_gives_none(p, message):
    with pytest.raises(ValueError, match=f"^apply_mixout: p: expected patterns that match, {message}"):
        mk.apply_mixout(net(), p=p)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        ({"body.*": 1.5}, ValueError, r"p\['body\.\*'\]: expected a number in \[0, 1\], got 1\.5"),
        ({5: 0.5}, TypeError, "p: expected patterns as keys, got 5"),
        ({}, ValueError, "nothing to mix"),
    ],
    ids=["rate", "key", "empty"],
)
def test_a_mapping_that_does_not_fit(p, error, message):
    with pytest.raises(error, match=f"^apply_mixout: {message}"):
        mk.apply_mixout(net(), p=p)


def test_layers_of_different_p_train_with_one_sampler():
    model = net()
    mk.apply_mixout(model, p={"query": 0.25, "output": 0.5})
    mk.MixSampler(model, premix=True)
    with torch.no_grad():
        for layer in model["body"]:
            layer.query.target.zero_()
            layer.query.weight.fill_(1)
            layer.query.bias.zero_()
    y = model["body"][0].query(torch.eye(8))
    assert set(y.unique().tolist()) <= {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(1 / 0.75)


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["query", "ouptut"]},
            "include: expected patterns that match a linear layer .* got 'ouptut'",
        ),
        (
            {"exclude": ["clasifier"]},
            "exclude: expected patterns that match a linear layer .* got 'clasifier'",
        ),
        (
            {"exclude": (*mk.DEFAULT_HEADS, "haed")},
            "exclude: .* match a linear layer .* got 'haed'",
        ),
    ],
    ids=["include", "exclude", "with-defaults"],
)
def test_a_typo_in_a_pattern(options, message):
    with pytest.raises(ValueError, match=f"^apply_mixout: {message}"):
        mk.apply_mixout(net(), p=0.5, **options)


def test_default_heads_that_the_model_has_not_are_no_typos():
    assert set(mk.apply_mixout(net(), p=0.5, exclude=(*mk.DEFAULT_HEADS, "body.0.*")).mixed) == BODY - {
        "body.0.query",
        "body.0.output",
    }


def test_a_module_under_two_names_is_left_out_if_one_is_excluded():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(8, 8)})
    report = mk.apply_mixout(model, p=0.5, exclude=["b"])
    assert set(report.mixed) == {"c"}
    assert report.skipped == {"a": "excluded by 'b'", "b": "excluded by 'b'"}


# --- what is pretrained -----------------------------------------------------------------------------------------------


def mark(model, names):
    """As transformers' from_pretrained marks what it loads."""
    for name in names:
        model.get_submodule(name).weight._is_hf_initialized = True


def test_the_loaders_marks_come_before_names():
    model = net()
    mark(model, ["body.0.query", "body.1.query", "classifier"])
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"body.0.query", "body.1.query", "classifier"}
    assert report.skipped["body.0.output"] == "new: from_pretrained did not load it"


def test_missing_keys_come_before_names():
    report = mk.apply_mixout(net(), p=0.5, missing_keys=["body.0.query.weight", "body.0.query.bias"])
    assert set(report.mixed) == BODY - {"body.0.query"} | {"classifier"}
    assert report.skipped["body.0.query"] == "new: missing_keys has it"


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod."])
def test_missing_keys_of_what_wraps_the_model(before):
    report = mk.apply_mixout(net(), p=0.5, missing_keys=[f"{before}classifier.weight", f"{before}classifier.bias"])
    assert set(report.mixed) == BODY
    assert report.skipped["classifier"] == "new: missing_keys has it"


def test_no_missing_keys_make_all_pretrained():
    assert set(mk.apply_mixout(net(), p=0.5, missing_keys=[]).mixed) == BODY | {"classifier"}


def test_missing_keys_may_be_of_buffers_and_tied_parameters_alone():
    model = net()
    model["classifier"].register_buffer("steps", torch.zeros(1), persistent=False)
    assert set(mk.apply_mixout(model, p=0.5, missing_keys=["classifier.steps"]).mixed) == BODY | {"classifier"}
    model = net()
    model["body"][1].query.weight = model["body"][0].query.weight
    report = mk.apply_mixout(model, p=0.5, missing_keys=["body.1.query.weight"])
    assert set(report.mixed) == {"body.0.output", "body.1.output", "classifier"}


class MissingAndUnexpected(NamedTuple):
    missing_keys: list
    unexpected_keys: list


@pytest.mark.parametrize(
    ("missing_keys", "error", "message"),
    [
        ("classifier.weight", TypeError, "expected a list of names of parameters, got the string 'classifier.weight'"),
        (
            MissingAndUnexpected(["classifier.weight"], []),
            TypeError,
            "expected a list of names of parameters, got Missi",
        ),
        ([b"classifier.weight"], TypeError, "expected a list of names of parameters, got [b'classifier.weight']"),
        (3, TypeError, "expected a list of names of parameters, got 3"),
        (
            ["head.weight", "head.bias"],
            ValueError,
            "expected names of the model's parameters, such as body.0.query.weight, body.0.query.bias, "
            "body.0.output.weight, got 'head.weight', 'head.bias', of which it has none",
        ),
        ({"missing_keys": [], "unexpected_keys": []}, ValueError, "got 'missing_keys', 'unexpected_keys', of which"),
    ],
    ids=["a string", "what load_state_dict returns", "bytes", "a number", "other names", "loading info"],
)
@pytest.mark.parametrize("function", ["apply_mixout", "decay_to_target"])
def test_missing_keys_that_would_make_a_new_head_pretrained(function, missing_keys, error, message):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call = {
        "apply_mixout": lambda: mk.apply_mixout(model, p=0.5, missing_keys=missing_keys),
        "decay_to_target": lambda: mk.decay_to_target(optimizer, model, 0.1, missing_keys=missing_keys),
    }[function]
    with pytest.raises(error, match=f"^{function}: missing_keys: .*{re.escape(message)}"):
        call()


def test_targets_come_before_all():
    model = net()
    mark(model, ["body.0.query"])
    targets = {f"{name}.weight": torch.zeros(8, 8) for name in BODY} | {"classifier.weight": torch.ones(2, 8)}
    del targets["body.0.query.weight"]
    report = mk.apply_mixout(model, p=0.5, targets=targets, missing_keys=["classifier.weight"])
    assert set(report.mixed) == BODY - {"body.0.query"} | {"classifier"}
    assert report.skipped["body.0.query"].startswith("new: targets has no entry for it, but 4 others such as 'body.")
    assert torch.equal(model["classifier"].target, torch.ones(2, 8))


def test_names_come_last():
    report = mk.apply_mixout(net(), p=0.5)
    assert set(report.mixed) == BODY
    assert report.skipped["classifier"] == "excluded by 'classifier': new, by its name"


def test_a_list_of_exclude_says_all():
    """exclude=() is the paper's section 6.2: a new head is mixed with its own initial weight."""
    model = net()
    mark(model, ["body.0.query"])
    assert set(mk.apply_mixout(model, p=0.5, exclude=()).mixed) == BODY | {"classifier"}


def test_a_models_own_new_layers_by_its_class():
    class DebertaV2ForSequenceClassification(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(8, 8)
            self.pooler = nn.ModuleDict({"dense": nn.Linear(8, 8)})

    report = mk.apply_mixout(nn.ModuleDict({"inner": DebertaV2ForSequenceClassification()}), p=0.5)
    assert set(report.mixed) == {"inner.encoder"}
    assert "new, by its name" in report.skipped["inner.pooler.dense"]
    plain = nn.ModuleDict({"encoder": nn.Linear(8, 8), "pooler": nn.ModuleDict({"dense": nn.Linear(8, 8)})})
    assert set(mk.apply_mixout(plain, p=0.5).mixed) == {"encoder", "pooler.dense"}


def test_the_heads_of_timm_by_their_places():
    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({"fc": nn.Linear(8, 8)})  # an inner layer of that name is pretrained
            self.head, self.head_dist, self.fc = (nn.Linear(8, 8) for _ in range(3))

    assert set(mk.apply_mixout(Vit(), p=0.5).mixed) == {"blocks.fc", "head", "head_dist", "fc"}
    Vit.__module__ = "timm.models.vision_transformer"
    assert set(mk.apply_mixout(Vit(), p=0.5).mixed) == {"blocks.fc"}


# --- frozen, of another dtype, under a policy, not reached ------------------------------------------------------------


def test_frozen_weights_are_left_out_unless_asked_for():
    for frozen, expected in ((False, {"body.1.query", "body.1.output"}), (True, BODY)):
        model = net()
        model["body"][0].requires_grad_(False)
        report = mk.apply_mixout(model, p=0.5, frozen=frozen)
        assert set(report.mixed) == expected
        assert frozen or report.skipped["body.0.query"] == "frozen: its weight does not train"


def test_nothing_but_frozen_weights():
    message = r"nothing to mix: .*body\.0\.query \(frozen: .*A LoRA model keeps its lora_dropout"
    with pytest.raises(ValueError, match=message):
        mk.apply_mixout(net().requires_grad_(False), p=0.5)


def test_a_complex_layer_does_not_block_a_model():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "fourier": nn.Linear(4, 4, dtype=torch.complex64)})
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"a"}
    assert report.skipped["fourier"] == "its weight is torch.complex64"


def test_only_layers_with_a_dropout_to_replace():
    """As the paper's authors did for BERT: its intermediate layers have no dropout."""
    model = nn.ModuleDict({"self": Block(0.1), "intermediate": Block(), "off": Block(0.0)})
    report = mk.apply_mixout(model, p=0.5, policy="after-dropout")
    assert set(report.mixed) == {"self.query", "self.output"}
    assert report.skipped["intermediate.query"].startswith("its module has no dropout that mixout could replace")
    with pytest.raises(ValueError, match="policy: expected one of 'linear', 'after-dropout', got 'all'"):
        mk.apply_mixout(net(), p=0.5, policy="all")


class ReadsElsewhere(nn.Module):
    """One layer that is called, one whose weight alone is read, one that nothing reads."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.unused = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.noise = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return scale * self.norm(self.called(x)) @ self.read.weight


@pytest.mark.parametrize(
    "example",
    [torch.ones(2, 8), (torch.ones(2, 8), 2.0), {"x": torch.ones(2, 8), "scale": 3.0}],
    ids=["tensor", "tuple", "mapping"],
)
def test_an_example_proves_which_layers_are_reached(example):
    model = ReadsElsewhere()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = mk.apply_mixout(model, p=0.5, example=example)
    assert set(report.mixed) == {"called"}
    for name in ("read", "unused"):
        assert report.skipped[name].startswith("not reached: the example's forward did not call it")
        assert type(model.get_submodule(name)) is nn.Linear
    assert model.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.called._forward_pre_hooks


def test_an_example_that_fails_changes_nothing():
    model = ReadsElsewhere()
    with pytest.raises(RuntimeError):
        mk.apply_mixout(model, p=0.5, example=torch.ones(2, 3))
    assert model.training
    assert type(model.called) is nn.Linear
    assert not model.called._forward_pre_hooks
    assert model.noise.p == 0.5


def test_24_layers_are_converted_in_less_than_a_second():
    """Apart from copying targets, which these have hardly any bytes for: the best of three, on any machine."""
    model = nn.ModuleDict({f"layer_{i}": nn.ModuleDict({str(k): nn.Linear(4, 4) for k in range(6)}) for i in range(24)})
    model["heads"] = nn.Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.1)) for _ in range(72)))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert len(mk.apply_mixout(model, p=0.5).mixed) == 144
        seconds.append(time.perf_counter() - begin)
        mk.remove_mixout(model)
    assert min(seconds) < 1


# --- the report -------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """As JetMoE's: three dimensions, and the name ``weight``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 4))
        self.bias = nn.Parameter(torch.zeros(4))


def test_everything_with_two_dimensions_is_in_the_report():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "experts": Experts(),
            "bilinear": nn.Bilinear(4, 4, 4),
            "conv": nn.Conv2d(4, 4, 1),
            "embedding": nn.Embedding(4, 4),
            "norm": nn.LayerNorm(4),
        }
    )
    report = mk.apply_mixout(model, p=0.5)
    assert report.skipped == {
        "experts.weight": "Experts, a Parameter [2, 4, 4]: mixout() mixes it where it is read",
        "bilinear.weight": "Bilinear, a Parameter [4, 4, 4]: mixout() mixes it where it is read",
        "conv.weight": "Conv2d, a Parameter [4, 4, 1, 1]: mixout() mixes it where it is read",
        "embedding.weight": "Embedding, a Parameter [4, 4]: mixout() mixes it where it is read",
    }


def test_rows_are_what_the_table_shows():
    model = net(dropout=0.1)
    report = mk.apply_mixout(model, p=0.5)
    rows = report.rows()
    assert [row.name for row in rows if row.what == "mixed"] == list(report.mixed)
    assert {row.name: row.detail for row in rows if row.what == "skipped"} == report.skipped
    assert {row.name: row.detail for row in rows if row.what == "dropout"} == report.dropout
    for line, row in zip(str(report).splitlines()[1:], rows, strict=True):
        assert line.split()[:2] == [*row.what.split()[:1], row.name]
        assert line.endswith(row.detail)


def test_check_names_the_layers_that_were_replaced():
    """As resize_token_embeddings replaces an output layer by a plain one."""
    model = net()
    report = mk.apply_mixout(model, p=0.5)
    report.check(model)
    model["body"][0].query = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"got 1 that are mixed no longer: body\.0\.query; call remove_mixout"):
        report.check(model)


@pytest.mark.parametrize("part", [None, "body"], ids=["whole", "part"])
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_check_looks_through_wrappers(wrap, part):
    model = net()
    report = mk.apply_mixout(model, p=0.5)
    wrapped = wrap(model) if part is None else nn.ModuleDict({"body": wrap(model["body"])})
    report.check(wrapped)
    model["body"][1].query = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"got 1 that are mixed no longer: body\.1\.query; call"):
        report.check(wrapped)


def test_check_names_a_layer_whose_weight_was_replaced():
    """As resize_token_embeddings does where it is tied."""
    model = net()
    report = mk.apply_mixout(model, p=0.5)
    model["body"][0].query.weight = nn.Parameter(torch.ones(9, 8))
    with pytest.raises(ValueError, match=r"got 1 that are mixed no longer: body\.0\.query; call remove_mixout"):
        report.check(model)


def test_an_attention_of_ones_own_calls_its_output_projection():
    class MultiheadAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj = nn.Linear(8, 8)

    assert set(mk.apply_mixout(nn.ModuleDict({"a": MultiheadAttention()}), p=0.5).mixed) == {"a.out_proj"}
