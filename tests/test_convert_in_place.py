"""A conversion keeps every module the object that it is: what refers to one goes on working, there and back."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixout_kernels as mk


class Listed(nn.Module):
    """Calls its layers through a list, a dict and bound methods, none of which registers a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.calls = [self.first]
        self.by_name = {"second": self.second}

    def forward(self, x):
        return self.third(self.by_name["second"](self.calls[0](x)))


class Scaled(nn.Linear):
    """A subclass that adds an attribute and a method, and no forward."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.factor = 3.0

    def scaled(self):
        return self.factor * self.weight


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return 2 * F.linear(input, self.weight, self.bias)


def is_mixing(module, x):
    """Whether two training forwards differ, the weights having left their targets."""
    return not torch.equal(module(x), module(x))


def moved(model, by=0.25):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    return model


def x_of(width=16, rows=5):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def test_a_layer_in_a_list_is_mixed():
    model = Listed()
    layers = [model.first, model.second, model.third]
    mk.apply_mixout(model, p=0.5)
    assert [model.first, model.second, model.third] == layers
    moved(model)
    for layer in (model.calls[0], model.by_name["second"]):
        assert is_mixing(layer, x_of())
    mk.remove_mixout(model)
    assert model.calls[0] is model.first
    assert all(type(layer) is nn.Linear for layer in layers)
    assert not is_mixing(model, x_of())


def test_a_bound_forward_is_mixed():
    """``call = layer.forward`` looks the layer's own up no more: where it lies on the instance, it is bound anew."""
    layer = nn.Linear(16, 16)
    layer.forward = layer.forward
    model = moved_after_mixout(nn.Sequential(layer))
    assert is_mixing(model, x_of())
    mk.remove_mixout(model)
    assert not is_mixing(model, x_of())


def moved_after_mixout(model, **options):
    mk.apply_mixout(model, **({"p": 0.5} | options))
    return moved(model)


def test_a_wrapped_forward_is_left_out_and_said():
    """A closure over the plain forward cannot be made to end in the mixed one."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) + 1
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"1"}
    assert report.skipped["0"].startswith("its forward was replaced on the instance")


def test_a_forward_wrapped_after_conversion_is_plain_after_removal():
    layer = nn.Linear(16, 16)
    model = moved_after_mixout(nn.Sequential(layer))
    mixed = layer.forward
    layer.forward = lambda x: mixed(x) + 1
    assert is_mixing(model, x_of())
    mk.remove_mixout(model)
    torch.testing.assert_close(model(x_of()), F.linear(x_of(), layer.weight, layer.bias) + 1)


def test_accelerates_hooks_end_in_the_mixed_forward():
    hooks = pytest.importorskip("accelerate.hooks")
    before, after = nn.Linear(16, 16), nn.Linear(16, 16)
    hooks.add_hook_to_module(before, hooks.AlignDevicesHook("cpu"))
    model = nn.Sequential(before, after)
    mk.apply_mixout(model, p=0.5)
    hooks.add_hook_to_module(after, hooks.AlignDevicesHook("cpu"))
    moved(model)
    for layer in model:
        assert is_mixing(layer, x_of())
    mk.remove_mixout(model)
    for layer in model:
        assert not is_mixing(layer, x_of())
        hooks.remove_hook_from_module(layer)
        assert not is_mixing(layer, x_of())
        assert type(layer) is nn.Linear


def test_a_hook_taken_away_while_mixed():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(16, 16))
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu"))
    moved_after_mixout(model)
    hooks.remove_hook_from_module(model[0])
    assert is_mixing(model, x_of())
    mk.remove_mixout(model)
    assert not is_mixing(model, x_of())


@pytest.mark.parametrize("compiled", [lambda m: torch.compile(m, backend="eager"), lambda m: compiled_in_place(m)])
def test_compiled_before_conversion(compiled):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    call = compiled(model)
    before = call(x_of())
    mk.apply_mixout(model, p=0.5)
    moved(model)
    assert is_mixing(call, x_of())
    moved(model, -0.25)
    mk.remove_mixout(model)
    assert torch.equal(call(x_of()), before)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def test_a_setting_changed_under_compile_is_followed():
    """fullgraph: settings, the target and the slot are read without a graph break."""
    model = moved_after_mixout(nn.Sequential(nn.Linear(16, 16)))
    call = torch.compile(model, backend="eager", fullgraph=True)
    assert is_mixing(call, x_of())
    model[0].p = 1.0
    assert torch.equal(call(x_of()), F.linear(x_of(), model[0].target, model[0].bias))
    model[0].p = 0
    assert torch.equal(call(x_of()), F.linear(x_of(), model[0].weight, model[0].bias))


# --- subclasses of Linear ---------------------------------------------------------------------------------------------


def test_subclasses_are_left_alone_by_default_and_the_error_says_how_to_mix_them():
    model = nn.Sequential(Scaled(16, 16), Doubled(16, 16))
    with pytest.raises(ValueError, match=r"Scaled is a subclass of Linear \(on request.*subclasses= mixes subclasses"):
        mk.apply_mixout(model, p=0.5)


def test_subclasses_that_add_no_forward_are_mixed_on_request():
    model = nn.Sequential(Scaled(16, 16), Doubled(16, 16))
    report = mk.apply_mixout(model, p=0.5, subclasses=True)
    assert report.mixed == {"0": "MixScaled [16, 16], p=0.5"}
    assert report.skipped == {"1": "Doubled is a subclass of Linear (with a forward of its own)"}
    moved(model)
    assert is_mixing(model[0], x_of())
    assert isinstance(model[0], Scaled)
    assert isinstance(model[0], mk.MixLinear)
    assert torch.equal(model[0].scaled(), 3 * model[0].weight)
    mk.remove_mixout(model)
    assert type(model[0]) is Scaled


def test_a_subclass_with_a_mask_of_its_own_is_left_alone():
    """to_plain could not tell it from the layer's, and would take it away."""

    class Masked(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.mask = "its own"

    model = nn.Sequential(Masked(16, 16), nn.Linear(16, 16))
    report = mk.apply_mixout(model, p=0.5, subclasses=True)
    assert report.skipped == {"0": "Masked has attributes of its own that a mixed layer needs: mask"}
    with pytest.raises(TypeError, match="expected a layer without attributes named as its settings, got a Masked with"):
        mk.MixLinear.from_linear(model[0], p=0.5)
    mk.remove_mixout(model)
    assert model[0].mask == "its own"


def test_listed_subclasses_are_mixed_whatever_their_forward():
    model = nn.Sequential(Scaled(16, 16), Doubled(16, 16))
    report = mk.apply_mixout(model, p=0.5, subclasses=[Doubled])
    assert set(report.mixed) == {"1"}
    assert torch.equal(model.eval()[1](x_of()), F.linear(x_of(), model[1].weight, model[1].bias))
    mk.remove_mixout(model)
    assert torch.equal(model[1](x_of()), 2 * F.linear(x_of(), model[1].weight, model[1].bias))


@pytest.mark.parametrize("subclasses", ["Scaled", [Scaled, 5], [nn.Conv1d], 1], ids=str)
def test_subclasses_that_are_none(subclasses):
    with pytest.raises(TypeError, match="apply_mixout: subclasses: expected True, False or a list of subclasses of nn"):
        mk.apply_mixout(nn.Sequential(Scaled(16, 16)), p=0.5, subclasses=subclasses)


def test_attention_reads_its_output_projection_itself_whatever_is_allowed():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = mk.apply_mixout(model, p=0.5, subclasses=True)
    assert report.skipped["self_attn.out_proj"] == "nn.MultiheadAttention reads its weight itself, without its forward"


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: save_and_load(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_mixed_subclass_is_copied_with_what_it_adds(duplicate):
    model = moved_after_mixout(nn.Sequential(Scaled(16, 16)), subclasses=True)
    other = duplicate(model)
    assert type(other[0]) is type(model[0])
    assert other[0].factor == 3.0
    assert torch.equal(other[0].target, model[0].target)
    assert is_mixing(other, x_of())
    mk.remove_mixout(other)
    assert type(other[0]) is Scaled
    assert isinstance(model[0], mk.MixLinear)


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_from_linear_keeps_what_a_subclass_adds():
    linear = Scaled(16, 16)
    module = mk.MixLinear.from_linear(linear, p=0.5)
    assert type(linear) is Scaled
    assert isinstance(module, Scaled)
    assert isinstance(module, mk.MixLinear)
    assert torch.equal(module.scaled(), linear.scaled())
    message = r"^MixLinear\.from_linear: linear: expected the forward of nn\.Linear, got a Doubled, which has one of"
    with pytest.raises(TypeError, match=message):
        mk.MixLinear.from_linear(Doubled(4, 4), p=0.5)


def test_transformers_conv1d_stays_one():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(12, 16))
    conv = model[0]
    mk.apply_mixout(model, p=0.5)
    assert model[0] is conv
    assert isinstance(conv, pytorch_utils.Conv1D)
    assert isinstance(conv, mk.MixConv1D)
    assert isinstance(copy.deepcopy(conv), mk.MixConv1D)
    moved(model)
    torch.manual_seed(5)
    y = conv(x=x_of())
    torch.manual_seed(5)
    assert torch.equal(conv(x_of()), y)
    mk.remove_mixout(model)
    assert type(conv) is pytorch_utils.Conv1D


# --- parametrized after conversion ------------------------------------------------------------------------------------

PARAMETRIZATIONS = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "old weight_norm": functools.partial(torch.nn.utils.weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_layer_that_was_parametrized_since(name):
    model = moved_after_mixout(nn.Sequential(nn.Linear(16, 16)))
    PARAMETRIZATIONS[name](model[0])
    moved(model)
    model.train()
    model(x_of()).sum().backward()
    weight = model.eval()[0].weight.detach().clone()
    mk.remove_mixout(model)
    assert not isinstance(model[0], mk.MixLinear)
    assert not hasattr(model[0], "target")
    torch.testing.assert_close(model(x_of()), F.linear(x_of(), weight, model[0].bias))
    if name != "old weight_norm":
        assert type(model[0]).__name__ == "ParametrizedLinear"
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [True, False], ids=["sampler", ""])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("p", 1.0000001, ValueError, r"p: expected a number in \[0, 1\], got 1.0000001"),
        ("p", float("nan"), ValueError, r"p: expected a number in \[0, 1\], got nan"),
        ("p", -0.2, ValueError, r"p: expected a number in \[0, 1\], got -0.2"),
        ("p", "0.3", TypeError, r"p: expected a number in \[0, 1\], got str"),
        ("grad_p", 2, ValueError, r"grad_p: expected a number in \[0, 1\], got 2"),
        ("mask", "neurn", ValueError, "mask: expected one of 'neuron', 'weight', .*, got 'neurn'"),
        ("rescale", 1, TypeError, "rescale: expected True or False, got 1"),
        ("target", torch.zeros(3, 3), ValueError, r"target: expected the weight's shape \[16, 16\], got \[3, 3\]"),
        ("target", "w", TypeError, "target: expected a tensor, got str"),
        ("target", torch.zeros(16, 16).double(), TypeError, "target: expected the weight's dtype torch.float32 or"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_raises_where_it_is_set(name, value, error, message, sampler):
    model = nn.Sequential(nn.Linear(16, 16))
    mk.apply_mixout(model, p=0.5)
    if sampler:
        mk.MixSampler(model)
    before = getattr(model[0], name)
    with pytest.raises(error, match=f"^MixLinear: {message}"):
        setattr(model[0], name, value)
    assert getattr(model[0], name) is before


def test_settings_can_be_changed():
    layer = mk.MixLinear(16, 16, p=0.5)
    layer.p, layer.grad_p, layer.rescale, layer.mask, layer.target = 0.25, 0.5, False, "weight", torch.zeros(16, 16)
    assert "p=0.25, grad_p=0.5, mask='weight', target=frozen" in repr(layer)
    assert "grad_p" not in repr(mk.MixLinear(16, 16, p=0.5))


@pytest.mark.parametrize("sampler", [True, False], ids=["sampler", ""])
def test_a_weight_that_was_cast_by_itself_takes_its_target_along(sampler):
    """``p.data = p.data.bfloat16()`` bypasses the module: a float32 target would be left beside a bfloat16 weight."""
    model = nn.Sequential(nn.Linear(16, 16))
    mk.apply_mixout(model, p=0.5)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    if sampler:
        mk.MixSampler(model)
    model(x_of().bfloat16()).sum().backward()
    assert model[0].target.dtype == model[0].weight.grad.dtype == torch.bfloat16
    assert torch.equal(model[0].target, model[0].weight)
