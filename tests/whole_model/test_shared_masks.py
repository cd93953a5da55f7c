"""Layers that read the same activation share a mask and save x[:, kept] once, with the gradients of unshared layers."""

import gc
import weakref

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels.sampler.siblings import SAME_INPUT

from . import models
from .transformers_models import MODELS, SIBLINGS, inputs, make


def groups_of(model):
    """The layers of each mask, by their seeds."""
    groups = {}
    for name, seed in models.seeds_of(model).items():
        groups.setdefault(seed, []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("name", MODELS)
def test_siblings_have_one_mask_and_no_others_do(name):
    model = models.with_mixout(make(name))
    mk.MixSampler(model)
    shared = sorted(group for group in groups_of(model) if len(group) > 1)
    expected = []
    for module_name, module in model.named_modules():
        for siblings in SIBLINGS[name]:
            if all(hasattr(module, sibling) for sibling in siblings):
                expected.append([f"{module_name}.{sibling}" for sibling in siblings])
    assert shared == sorted(expected)
    assert len(expected) == 2 * len(SIBLINGS[name])
    for group in shared:
        masks = [models.mask_of(model.get_submodule(layer))[0] for layer in group]
        assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize(("share_masks", "same"), [(SAME_INPUT, False), ((), True)], ids=["shared", "own"])
def test_masks_go_with_the_names_of_all_that_share_them(share_masks, same):
    """As the docs say of a sibling that is left out."""
    found = []
    for exclude in (["classifier"], ["classifier", "key"]):
        model = make("bert")
        mk.apply_mixout(model, p=0.5, exclude=exclude)
        mk.MixSampler(model, seed=1, share_masks=share_masks)
        found.append(models.seeds_of(model))
    query = next(name for name in found[1] if name.endswith("query"))
    output = next(name for name in found[1] if name.endswith("output.dense"))
    assert (found[0][query] == found[1][query]) is same
    assert found[0][output] == found[1][output]


def saved_tensors(model, x, call=None):
    """What forward keeps for backward, one tensor for each storage; without seeds and other integers."""
    saved = {}

    def note(t):
        if t.is_floating_point():
            saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = (call or model)(x)
    return list(saved.values()), output


def saved_bytes(model, x):
    return sum(t.untyped_storage().nbytes() for t in activations_of(model, saved_tensors(model, x)[0]))


def activations_of(model, tensors):
    """These without the parameters, the targets and what is mixed ahead."""
    layers = models.mixed_layers(model).values()
    made = [t for layer in layers for t in (layer.target, getattr(layer.slot, "mixed", None)) if t is not None]
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *made)}
    return [t for t in tensors if t.untyped_storage().data_ptr() not in known]


@pytest.mark.parametrize("name", [name for name in MODELS if SIBLINGS[name]])
def test_kept_columns_are_saved_once(name):
    """What the siblings after the first do not save is their x[:, kept], to the byte."""
    model, x = models.with_mixout(make(name)), inputs(name)
    mk.MixSampler(model)
    models.run(model, x)
    shared = saved_bytes(model, x)
    rows = model(x).shape[:2].numel()
    saving = 0
    for group in groups_of(model):
        kept = int(models.mask_of(model.get_submodule(group[0]))[0].sum())
        saving += (len(group) - 1) * rows * kept * 4
    assert saving > 0
    with models.layer_by_layer(model):
        assert saved_bytes(model, x) - shared == saving


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_unshared_layers_with_the_same_seeds(name, premix):
    model, x = models.with_mixout(make(name)), inputs(name)
    mk.MixSampler(model, premix=premix)
    for _ in range(2):
        ours = models.run(model, x)
        with models.layer_by_layer(model):
            ours.assert_same_bits(models.run(model, x))


@pytest.mark.parametrize("calls", [1, 2], ids=["first call", "second call"])
def test_siblings_cast_their_input_once_under_autocast(calls):
    """As accurate as when each casts for itself, although their dx are then added in bfloat16."""
    model, x = models.with_mixout(models.Attention()), models.random_input()
    mk.MixSampler(model, seed=3)

    def inputs_of_products():
        """The nodes whose outputs the three products read, of which a cast is one."""
        leaf = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [layer(leaf) for layer in (model.query, model.key, model.value)]
        return [y.grad_fn.next_functions[0][0] for y in outputs]

    def gradient(dtype):
        leaf = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            model(leaf).float().square().sum().backward()
        return leaf.grad

    for _ in range(calls):
        nodes = inputs_of_products()
        ours = gradient(torch.bfloat16)
    assert [node.name() for node in nodes] == ["ToCopyBackward0"] * 3
    assert nodes[0] is nodes[1] is nodes[2]
    exact = gradient(None)
    with models.layer_by_layer(model):
        alone = gradient(torch.bfloat16)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.5 * (alone - exact).norm()


@pytest.mark.parametrize("grad", [True, False], ids=["leaf", "input"])
def test_nothing_stays_shared_after_cross_attention(grad):
    """The query reads another input than key and value. What they share of a leaf would keep the leaf itself."""
    model = models.with_mixout(models.Attention())
    mk.MixSampler(model, seed=3)
    shared = model.query.slot.shared
    for _ in range(2):
        x, memory = (models.random_input().requires_grad_(grad) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            y = model.query(x) + model.key(memory) + model.value(memory)
        assert (shared.input, shared.cast, shared.kept) == (None, None, None)
        y.float().sum().backward()
        gone = weakref.ref(memory)
        del x, memory, y
        gc.collect()
        assert gone() is None


def test_an_input_that_requires_grad_only_later():
    model, x = models.with_mixout(models.Attention()), models.random_input()
    mk.MixSampler(model, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        query = model.query(x)
        x.requires_grad_()
        y = query + model.key(x) + model.value(x)
    y.float().sum().backward()
    assert x.grad.any()


def test_an_input_of_inference_mode():
    """It has no version to tell whether it has changed since, so that nothing is shared."""
    model = models.with_mixout(models.Attention())
    mk.MixSampler(model, seed=3)
    with torch.inference_mode():
        x = models.random_input()
    outputs = []
    for input in (x, x.clone()):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(input))
        outputs[-1].float().sum().backward()
    assert torch.equal(*outputs)


def test_accumulated_micro_batches():
    """x[:, kept] of the first micro-batch is not taken for the second."""
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model)

    def accumulated():
        model.zero_grad()
        losses = [model(models.random_input(rows)).square().sum() for rows in (6, 6, 3)]
        sum(losses).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    ours = accumulated()
    with models.layer_by_layer(model):
        for first, second in zip(ours, accumulated(), strict=True):
            assert torch.equal(first, second)


def attention(**options):
    torch.manual_seed(0)
    model = models.with_mixout(models.Attention(), **options)
    mk.MixSampler(model, seed=3)
    return model


def in_place(model, x):
    x = x.clone()
    first = model.query(x)
    x.add_(1)
    return first + model.key(x) + model.value(x)


def another_input_for_the_query(model, x):
    return model.query(x.flip(0)) + model.key(x) * model.value(x)


def in_turns(model, x):
    y = x.flip(0)
    return model.query(x) + model.key(y) + model.value(x) + model.query(y) + model.key(x)


def one_sibling_alone(model, x):
    return model.query(x) + model.value(x)


def a_sibling_twice(model, x):
    return model.query(x) * model.query(x) + model.key(x) + model.value(x)


def another_dtype_in_between(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        low = model.query(x)
    return low.float() + model.key(x) + model.value(x)


CALLS = [in_place, another_input_for_the_query, in_turns, one_sibling_alone, a_sibling_twice, another_dtype_in_between]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("frozen", [None, "query", "key"])
def test_however_the_siblings_are_called(call, frozen):
    """Over several steps with the same input object: x[:, kept] is never one of another input, mask or dtype."""
    model, x = attention(), models.random_input()
    if frozen:
        getattr(model, frozen).weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        ours = models.run(model, x, lambda x: call(model, x))
        with models.layer_by_layer(model):
            ours.assert_same_bits(models.run(model, x, lambda x: call(model, x)))
        optimizer.step()


def other_p(model):
    model.key.p = 0.9


def other_mask(model):
    model.key.mask = "weight"


def other_grad_p(model):
    model.query.grad_p = 0.6


def gradients_masked_alone(model):
    model.value.p, model.value.grad_p = 0.0, 0.7


def gradients_not_rescaled(model):
    for layer in (model.query, model.key, model.value):
        layer.grad_p, layer.rescale = 0.4, layer is model.query


CHANGES = [other_p, other_mask, other_grad_p, gradients_masked_alone, gradients_not_rescaled]


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_are_changed_under_a_sampler(change, autocast, premix):
    """Each sibling gets the gradients of its own mask: x[:, kept] of one with other settings is another one."""
    torch.manual_seed(0)
    model, x = models.with_mixout(models.Attention()), models.random_input()
    mk.MixSampler(model, seed=3, premix=premix)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def results():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return models.run(model, x)

    for number in range(4):
        if number == 1:
            change(model)
        ours = results()
        with models.layer_by_layer(model):
            ours.assert_same_bits(results())
        optimizer.step()
    assert len(set(models.seeds_of(model).values())) == 1


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("mask", ["neuron", "weight", "output", "layer"])
def test_masked_gradients_are_those_of_the_reference(mask, p):
    model, x = models.with_mixout(models.attention_net(), mask=mask), models.random_input()
    for layer in models.mixed_layers(model).values():
        layer.p, layer.grad_p = p, 0.4
    mk.MixSampler(model, seed=3, premix=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        ours, torchs = models.run(model, x), models.reference_run(model, x)
        assert torch.equal(ours.output, torchs.output)
        models.assert_in_budget(ours, torchs, models.reference_run(model, x, torch.float64))
        optimizer.step()


@pytest.mark.parametrize("call", CALLS[:5])
def test_no_activation_outlives_backward(call):
    """Also where a sibling does not read what another has gathered for it."""
    model = attention()
    layer = nn.Linear(models.IN, models.IN)
    for _ in range(2):
        x = layer(models.random_input())
        tensors, output = saved_tensors(model, x, lambda x: call(model, x))
        activations = [weakref.ref(t) for t in activations_of(model, tensors)]
        assert activations
        output.sum().backward()
        del x, tensors, output
        gc.collect()
        assert not [reference().shape for reference in activations if reference() is not None]


def test_other_groups():
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model, share_masks=[("key", "value")])
    seeds = models.seeds_of(model)
    assert seeds["1.key"] == seeds["1.value"] != seeds["1.query"]


def test_no_groups():
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model, share_masks=())
    assert len(set(models.seeds_of(model).values())) == 5


def test_the_names_alone_do_not_make_siblings():
    """A weight mask, another p or grad_p, and another number of input features have masks of their own."""
    model = models.Attention()
    model.query = nn.Linear(models.IN - 1, models.IN)
    models.with_mixout(model)
    mk.MixSampler(model)
    assert len(set(models.seeds_of(model).values())) == 2

    model = attention()
    model.key.slot.sampler.remove()
    model.key.p, model.value.grad_p = 0.9, 0.1
    mk.MixSampler(model)
    assert len(set(models.seeds_of(model).values())) == 3

    assert len(set(models.seeds_of(attention(mask="weight")).values())) == 3


def test_the_same_names_under_other_parents_are_no_siblings():
    model = models.with_mixout(nn.Sequential(models.Attention(), models.Attention()))
    mk.MixSampler(model)
    assert len(groups_of(model)) == 2
