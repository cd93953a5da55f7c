"""Phi mixed ahead, once for all layers: the bits of mixing in every call, never stale, and its bytes."""

import copy

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels import _extension

from .. import axes
from . import models
from .transformers_models import MODELS, inputs, make


def train(model, x, steps=3, **options):
    """Losses and gradients of a few steps of a copy, all from the same first seed."""
    model = copy.deepcopy(model)
    sampler = mk.MixSampler(model, seed=23, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    results = []
    for _ in range(steps):
        results.append(models.run(model, x))
        optimizer.step()
    return results, sampler


def assert_premix_changes_no_bit(name, mask):
    model, x = models.with_mixout(make(name), mask=mask), inputs(name)
    (mixed, sampler), (alone, _) = train(model, x, premix=True), train(model, x, premix=False)
    assert sampler.extra_bytes > 0
    for first, second in zip(mixed, alone, strict=True):
        first.assert_same_bits(second)


@pytest.mark.parametrize("name", MODELS)
@axes.masks
def test_premix_changes_no_bit(name, mask):
    assert_premix_changes_no_bit(name, mask)


@pytest.mark.fused_product
@pytest.mark.parametrize("name", MODELS)
@axes.masks
def test_premix_changes_no_bit_of_a_fused_product(name, mask):
    assert_premix_changes_no_bit(name, mask)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@axes.masks
def test_under_autocast_phi_is_mixed_in_float32_and_rounded_once(low, mask):
    model = models.with_mixout(models.attention_net(), mask=mask)
    mk.MixSampler(model)
    with torch.autocast("cpu", low):
        model(models.random_input())
    for name, layer in models.mixed_layers(model).items():
        phi = mk.reference.mixout(layer.weight, layer.target, p=layer.p, mask=mask, seed=layer.slot.seed)
        assert layer.slot.mixed.dtype == low, name
        assert torch.equal(layer.slot.mixed, phi.to(low)), name


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_premix_changes_no_bit(low):
    model, x = models.with_mixout(models.attention_net()), models.random_input()

    def results(premix):
        copied = copy.deepcopy(model)
        mk.MixSampler(copied, seed=4, premix=premix)
        with torch.autocast("cpu", low):
            return models.run(copied, x)

    results(True).assert_same_bits(results(False))


@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_extra_bytes(low):
    """The numbers of the mixed weights, in the compute dtype; nothing before the first forward, and without premix."""
    for premix in (True, False):
        model = models.with_mixout(models.attention_net())
        numel = sum(layer.weight.numel() for layer in models.mixed_layers(model).values())
        sampler = mk.MixSampler(model, premix=premix)
        assert sampler.extra_bytes == 0
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            models.run(model, models.random_input())
        assert sampler.extra_bytes == (numel * (low or torch.float32).itemsize if premix else 0)


@pytest.mark.fused_product
@pytest.mark.parametrize("library_is_faster", [False, True])
def test_by_default_phi_is_mixed_ahead_only_where_no_fused_product_pays(monkeypatch, library_is_faster):
    monkeypatch.setattr(mk.backends.load("cpu"), "_LIBRARY_IS_FASTER", library_is_faster)
    monkeypatch.setattr(mk.backends.load("cpu"), "_BF16_UNIT", "none")
    model = models.with_mixout(models.attention_net())
    numel = sum(layer.weight.numel() for layer in models.mixed_layers(model).values())
    sampler = mk.MixSampler(model)
    models.run(model, models.random_input())
    assert sampler.extra_bytes == (4 * numel if library_is_faster else 0)
    with torch.autocast("cpu", torch.bfloat16):
        models.run(model, models.random_input())
    assert sampler.extra_bytes == 2 * numel


def mixes_of(monkeypatch):
    """How many layers each launch mixes, as they come."""
    cpu = mk.backends.load("cpu")
    calls, mixout_list = [], cpu.mixout_list

    def counted(outs, *arguments):
        calls.append(len(outs))
        mixout_list(outs, *arguments)

    monkeypatch.setattr(cpu, "mixout_list", counted)
    return calls


def test_one_launch_a_step(monkeypatch):
    calls = mixes_of(monkeypatch)
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        models.run(model, models.random_input())
        models.run(model, models.random_input())  # gradient accumulation
        optimizer.step()
    # In the first forward each layer learns its compute dtype; from then on all are mixed after the optimizer step.
    assert calls == [1] * 5 + [5] * 3


def test_one_launch_for_layers_of_any_p_and_mask(monkeypatch):
    calls = mixes_of(monkeypatch)
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    model[2].p, model[1].query.mask, model[1].key.mask = 0.8, "weight", "output"
    mk.MixSampler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models.step(model, optimizer, x)
    assert calls == [1] * 5 + [5]
    assert torch.equal(models.run(model, x).output, models.reference_run(model, x).output)


def load_state_dict(model):
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


def load_by_assignment(model):
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()}, assign=True)


def edit_in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def edit_a_row(model):
    with torch.no_grad():
        model[0].weight[3].zero_()


def replace_a_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)


def replace_a_target(model):
    model[0].target = model[0].target + 1


def edit_a_target(model):
    model[1].value.target.mul_(2)


def reload_half(model):
    model.bfloat16()
    model.float()


def reload_half_at_the_old_address(model):
    """What reload_half does when the allocator gives the memory that it has just taken back: a new storage there."""
    for layer in models.mixed_layers(model).values():
        memory = layer.weight.detach().numpy()
        memory[:] = layer.weight.detach().bfloat16().float().numpy()
        layer.weight.data = torch.from_numpy(memory)


EDITS = [
    load_state_dict,
    load_by_assignment,
    edit_in_place,
    edit_a_row,
    replace_a_weight,
    replace_a_target,
    edit_a_target,
    reload_half,
    reload_half_at_the_old_address,
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("edit", EDITS)
def test_phi_is_never_stale(edit, compiled):
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    model(x)
    before = models.run(model, x, call)
    edit(model)
    after = models.run(model, x, call)
    assert not torch.equal(before.output, after.output)
    with models.layer_by_layer(model):
        torch._dynamo.reset()
        after.assert_same_bits(models.run(model, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype(dtype):
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)
    models.run(model, x)
    model.to(dtype)
    ours = models.run(model, x.to(dtype))
    with models.layer_by_layer(model):
        ours.assert_same_bits(models.run(model, x.to(dtype)))


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
def test_an_optimizer_step_between_forward_and_backward_is_an_error(premix):
    """As in plain PyTorch, where the weight was modified in place; the mask of the forward is gone too."""
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, premix=premix)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models.run(model, models.random_input())
    loss = model(models.random_input()).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("premix", "change"), [(True, "target"), (True, "state"), (False, "target")])
def test_no_backward_uses_the_phi_of_another_forward(premix, change):
    """The first forward's Phi was overwritten, or its target was: its backward is an error."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, premix=premix)
    models.run(model, x)
    loss = model(x).square().sum()
    if change == "target":
        model[2].target.add_(1)
    else:
        sampler.load_state_dict({"seed": 0, "step": 9})
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_without_phi_has_the_mask_of_its_forward():
    """Nothing that it needs was overwritten but the sampler's seed, of which the CPU's layer holds the value."""
    if _extension.load()[0] is None:
        pytest.skip("NO COMPILED EXTENSION HERE")
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, premix=False, seed=1)
    expected = models.run(model, x)
    loss = model(x).square().sum()
    sampler.load_state_dict({"seed": 0, "step": 9})
    model(x)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected.gradients[name]), name


def test_no_backward_uses_the_phi_of_another_p():
    """Weight, target and seed are as they were: Phi alone was written again."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    mk.MixSampler(model)
    loss = model(x).square().sum()
    model[2].p = 0.9
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def zero_target(model):
    layer = model[0]
    model[0] = mk.MixLinear(models.IN, models.IN, p=0.5)
    model[0].load_state_dict(layer.state_dict())


def p_0(model):
    model[0].p = 0.0


def p_1(model):
    model[0].p = 1.0


@pytest.mark.parametrize("change", [zero_target, p_0, p_1])
def test_a_layer_that_needs_no_mixing_ahead_among_others(change, monkeypatch):
    calls = mixes_of(monkeypatch)
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    change(model)
    mk.MixSampler(model)
    ours = models.run(model, x)
    assert len(calls) == 4
    with models.layer_by_layer(model):
        ours.assert_same_bits(models.run(model, x))
    models.step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert calls[4:] == [4]


def test_a_part_of_the_model_outside_autocast(monkeypatch):
    """Each layer is mixed in its own compute dtype, and once a step: one launch for each dtype."""
    calls = mixes_of(monkeypatch)
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            x = model[1](model[0](x))
            with torch.autocast("cpu", enabled=False):
                return model[2](x.float())

    def trained():
        model.zero_grad()
        call(x).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    ours = trained()
    with models.layer_by_layer(model):
        for name, gradient in trained().items():
            assert torch.equal(gradient, ours[name]), name
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    calls.clear()
    for _ in range(3):
        trained()
        optimizer.step()
    assert calls == [4, 1] * 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_first(context):
    """A look at the training-mode outputs before training, as learning-rate finders and sanity checks take."""
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)
    with context():
        looked = model(x).clone()
    ours = models.run(model, x)
    assert torch.equal(ours.output, looked)
    with context():
        assert torch.equal(model(x), looked)
    with models.layer_by_layer(model):
        ours.assert_same_bits(models.run(model, x))


def test_func_transforms():
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)
    ours = models.run(model, x)
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    result = models.Results(ours.output, gradients)
    models.assert_in_budget(result, models.reference_run(model, x), models.reference_run(model, x, torch.float64))


def test_functional_call_with_other_weights():
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)
    own = model(x)
    other = {name: parameter.detach() + 0.5 for name, parameter in model.named_parameters()}
    ours = torch.func.functional_call(model, other, (x,))
    with models.layer_by_layer(model):
        assert torch.equal(ours, torch.func.functional_call(model, other, (x,)))
    assert torch.equal(model(x), own)


def test_without_kernels_the_reference_is_used(monkeypatch):
    """Where nothing is compiled, a sampler still draws the masks."""
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    sampler = mk.MixSampler(model)
    monkeypatch.setattr(mk.backends, "choose", lambda *_: "reference")
    ours = models.run(model, x)
    assert sampler.extra_bytes == 0
    torchs = models.reference_run(model, x)
    ours.assert_same_bits(torchs)


def test_evaluation_uses_the_weights_themselves():
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    mk.MixSampler(model)
    model(x)
    plain = copy.deepcopy(model)
    mk.remove_mixout(plain)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), plain(x))


@pytest.mark.parametrize("premix", [None, True, False])
@pytest.mark.parametrize("shape", [(9, 8), (4, 6)], ids=str)
def test_a_weight_of_another_shape_than_its_target_is_an_error_wherever_it_would_be_mixed(premix, shape):
    """As after resize_token_embeddings of a tied weight: a kernel would read past the target's end."""

    def replaced(model):
        model[0].weight = nn.Parameter(torch.ones(shape))
        model[0].bias = nn.Parameter(torch.ones(shape[0]))
        return model

    expected = rf"target: expected the weight's shape {list(shape)}, got [4, 8]: the weight was replaced since"
    expected = expected.replace("[", r"\[")
    model = nn.Sequential(nn.Linear(8, 4))
    mk.apply_mixout(model, p=0.5)
    sampler = mk.MixSampler(model, premix=premix)
    model(torch.ones(2, 8))
    replaced(model)
    with pytest.raises(ValueError, match=f"^MixLinear: {expected}"):
        model(torch.ones(2, shape[1]))
    if sampler.extra_bytes:
        with pytest.raises(ValueError, match=f"^MixLinear: {expected}"):
            sampler.advance()
    sampler.remove()
    with pytest.raises(ValueError, match=f"^MixSampler: model: 0: MixLinear: {expected}"):
        mk.MixSampler(model, premix=premix)
    with pytest.raises(ValueError, match=f"^MixLinear: {expected}"):
        model(torch.ones(2, shape[1]))
    mk.remove_mixout(model)
    model(torch.ones(2, shape[1]))
