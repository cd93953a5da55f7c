"""Which attributes are dropout rates, what they are while mixout is in the model, and what they are again after it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixout_kernels as mk


class StableDropout(nn.Module):
    """As SEW-D's."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


class LockedDropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


class Net(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.linear(x)


RATES = [
    ("dropout", 0.1),
    ("attention_dropout", 0.1),
    ("hidden_dropout_prob", 0.1),
    ("attention_probs_dropout_prob", 0.1),
    ("resid_pdrop", 0.1),
    ("drop_rate", 0.1),
    ("dropout_p", 0.1),
    ("classifier_dropout", 0.1),
    ("dropouts", [0.1, 0.0, 0.2]),
    ("dropout_rates", (0.1, 0.2)),
]
NO_RATES = [
    ("dropout_keep_prob", 0.9),
    ("dropout_scale", 1.0),
    ("keep_dropout_mask", 1.0),
    ("layerdrop", 0.1),
    ("drop_path_rate", 0.1),
    ("dropout", 1),
    ("dropout", True),
    ("dropout", "0.1"),
    ("dropout_temperature", 0.5),
    ("dropout", 2.5),
    ("dropouts", [0.1, 3.0]),
    ("p", 0.5),
]


def zero(rate):
    return type(rate)([0.0] * len(rate)) if isinstance(rate, (list, tuple)) else 0.0


@pytest.mark.parametrize(("name", "rate"), RATES, ids=[name for name, _ in RATES])
def test_a_rate_is_set_to_0_and_restored(name, rate):
    model = Net(**{name: rate})
    report = mk.apply_mixout(model, p=0.5)
    assert getattr(model, name) == zero(rate)
    assert report.dropout == {"": f"{name} {rate} -> 0"}
    mk.remove_mixout(model)
    assert getattr(model, name) == rate
    assert set(vars(model)) == set(vars(Net(**{name: rate})))


@pytest.mark.parametrize(("name", "value"), NO_RATES, ids=[f"{name}-{value}" for name, value in NO_RATES])
def test_what_is_no_rate_is_not_touched(name, value):
    model = Net(**{name: value})
    report = mk.apply_mixout(model, p=0.5)
    assert getattr(model, name) is value
    assert report.dropout == {}


@pytest.mark.parametrize("make", [StableDropout, LockedDropout, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_modules_of_any_name(make):
    module = make(0.3)
    name = "drop_prob" if make is StableDropout else "p"
    model = Net(noise=module)
    assert mk.apply_mixout(model, p=0.5).dropout == {"noise": f"{name} 0.3 -> 0"}
    assert getattr(module, name) == 0.0
    mk.remove_mixout(model)
    assert getattr(module, name) == 0.3


def test_stochastic_depth_goes_on_and_is_listed():
    model = Net(path=DropPath(0.2), layerdrop=0.1, dropout=0.3)  # BART's encoder has both
    report = mk.apply_mixout(model, p=0.5)
    assert report.dropout == {"": "dropout 0.3 -> 0"}
    assert report.dropout_left == {
        "": "layerdrop 0.1: stochastic depth, which mixout does not replace",
        "path": "drop_prob 0.2: stochastic depth, which mixout does not replace",
    }
    assert model.path.drop_prob == 0.2
    assert [row.name for row in report.rows() if row.what == "goes on"] == ["", "path"]


def test_a_rate_that_the_user_has_set_since_stays():
    model = Net(dropout=0.1, attention_dropout=0.2, noise=nn.Dropout(0.3))
    mk.apply_mixout(model, p=0.5)
    model.dropout, model.noise.p = 0.4, 0.5
    mk.remove_mixout(model)
    assert (model.dropout, model.attention_dropout, model.noise.p) == (0.4, 0.2, 0.5)


# --- rates that a forward reads from its config -----------------------------------------------------------------------


class Config:
    attribute_map = {"alias_dropout": "dropout"}  # noqa: RUF012 - as transformers has it

    def __init__(self):
        self.dropout, self.prenet_dropout, self.width, self.layerdrop = 0.5, 0.5, 4, 0.1


class ReadsConfig(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        assert self.config.width == 4
        return F.dropout(self.linear(x), p=self.config.dropout, training=self.training)


class AlwaysOn(nn.Module):
    """As SpeechT5's prenet: its dropout applies in evaluation too, and is part of the model."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        return F.dropout(x, self.config.prenet_dropout)


def test_a_rate_read_from_a_config_is_0_for_this_module_alone():
    config = Config()
    model = nn.Sequential(ReadsConfig(config), AlwaysOn(config))
    model.config = config
    report = mk.apply_mixout(model, p=0.5)
    assert report.dropout == {"0": "config.dropout 0.5 -> 0"}
    x = torch.randn(8, 4)
    assert torch.equal(model[0](x), model[0].linear(x))
    assert isinstance(model[0].config, Config)
    assert (config.dropout, model.config.dropout, model[1].config.prenet_dropout) == (0.5, 0.5, 0.5)
    config.width = 5  # the config is one for all that is no rate
    assert model[0].config.width == 5
    mk.remove_mixout(model)
    assert model[0].config is config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_its_config_one(copied):
    model = nn.Sequential(ReadsConfig(Config()))
    model.config = model[0].config
    mk.apply_mixout(model, p=0.5)
    other = copied(model)
    assert other[0].config.dropout == 0.0
    other.config.width = 7
    assert other[0].config.width == 7
    assert model.config.width == 4
    mk.remove_mixout(other)
    assert other[0].config is other.config
    assert model[0].config.dropout == 0.0


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "output": nn.Linear(8, 8), "noise": nn.Dropout(0.2)})
    model.forward = lambda x: model["output"](model["query"](x))
    config = peft.LoraConfig(target_modules=["query"], lora_dropout=0.1, r=2)
    return peft.inject_adapter_in_model(config, model)


def test_a_lora_models_dropout_goes_on_where_its_layers_are_not_mixed():
    model = lora()
    model["output"].requires_grad_(True)
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"output"}
    assert report.skipped["query.base_layer"].startswith("frozen")
    assert "new, by its name" in report.skipped["query.lora_B.default"]
    assert report.dropout_left == {"query.lora_dropout.default": "p 0.1: of an adapter, whose layers are not mixed"}
    assert report.dropout == {"noise": "p 0.2 -> 0"}
    assert model["query"].lora_dropout["default"].p == 0.1


def test_a_lora_model_alone_raises_and_says_what_to_do():
    with pytest.raises(ValueError, match=r"nothing to mix: .*A LoRA model keeps its lora_dropout.*recipes/peft\.md"):
        mk.apply_mixout(lora(), p=0.5)


def test_an_adapter_that_is_mixed_has_no_dropout():
    """lora_B starts at 0, which is its pretrained value: its target, and a mask over its ranks."""
    model = lora()
    report = mk.apply_mixout(model, p=0.5, include=["lora_B"], exclude=())
    assert set(report.mixed) == {"query.lora_B.default"}
    assert not model["query"].lora_B["default"].target.any()
    assert report.dropout == {"query.lora_dropout.default": "p 0.1 -> 0", "noise": "p 0.2 -> 0"}
