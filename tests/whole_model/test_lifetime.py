"""A sampler's life: copies of its model, its removal, its end, and what it refuses."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import mixout_kernels as mk

from . import models


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_of_the_model_has_no_sampler(copied):
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    sampler = mk.MixSampler(model)
    models.run(model, x)
    twin = copied(model)
    assert all(layer.slot is None for layer in models.mixed_layers(twin).values())
    assert not torch.equal(twin(x), twin(x))  # every forward draws anew
    assert torch.equal(model(x), model(x))
    mk.MixSampler(twin, seed=sampler.state_dict()["seed"])
    models.run(twin, x).assert_same_bits(models.run(model, x))
    # Steps of the copy are no steps of the original.
    models.step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), x)
    assert sampler.step == 0


def test_a_copy_of_one_layer_has_no_sampler():
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model)
    assert copy.deepcopy(model[0]).slot is None


def test_the_models_state_dict_is_the_plain_one():
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model)
    models.run(model, models.random_input())
    assert model.state_dict().keys() == models.attention_net().state_dict().keys()


def followers():
    """How many samplers follow the optimizers."""
    gc.collect()  # those of the tests before
    return len(mk.sampler.following.followers)


def test_remove():
    before = followers()
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    sampler = mk.MixSampler(model)
    models.run(model, x)
    assert followers() == before + 1
    sampler.remove()
    assert followers() == before
    assert not torch.equal(model(x), model(x))
    models.step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert sampler.step == 0
    sampler.remove()
    mk.MixSampler(model).remove()  # another one may follow
    sampler.remove()  # and again is no error
    assert followers() == before


@pytest.mark.parametrize("setting", ["every", "premix", "host_targets"])
def test_settings_that_hold_for_good_cannot_be_set(setting):
    sampler = mk.MixSampler(models.with_mixout(models.mlp()), every=2, premix=True)
    assert (sampler.every, sampler.premix, sampler.host_targets) == (2, True, False)
    with pytest.raises(AttributeError):
        setattr(sampler, setting, True)


def test_an_old_sampler_that_is_removed_again_leaves_the_new_one_alone():
    model, x = models.with_mixout(models.mlp()), models.random_input()
    old = mk.MixSampler(model)
    old.remove()
    mk.MixSampler(model)
    old.remove()
    assert torch.equal(model(x), model(x))


def test_remove_mixout_removes_the_sampler_too():
    before = followers()
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    sampler = mk.MixSampler(model)
    models.run(model, x)
    parameters = dict(model.named_parameters())
    mk.remove_mixout(model)
    assert followers() == before
    assert not models.mixed_layers(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(model(x), model.eval()(x))
    assert not any("slot" in vars(module) for module in model.modules())
    models.step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert sampler.step == 0


def test_a_sampler_goes_with_its_model():
    before = followers()
    model = models.with_mixout(models.attention_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = weakref.ref(mk.MixSampler(model))
    models.step(model, optimizer, models.random_input())
    gc.collect()
    assert reference() is not None  # the model keeps it
    assert followers() == before + 1
    del model
    gc.collect()
    assert reference() is None
    assert followers() == before
    optimizer.step()  # and nothing is left behind that a step would run into


def test_a_sampler_that_goes_while_an_optimizer_calls_its_hooks():
    """torch iterates over them: none may come or go meanwhile, and the garbage collector picks its own moments."""
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models.run(model, models.random_input())
    collection = register_optimizer_step_post_hook(lambda *_: gc.collect())
    gc.disable()
    try:
        dead = weakref.ref(mk.MixSampler(models.with_mixout(models.mlp())))
        assert dead() is not None
        optimizer.step()
        assert dead() is None
    finally:
        gc.enable()
        collection.remove()
    assert sampler.step == 1


def test_a_model_without_an_optimizer_of_torch_keeps_its_masks():
    """The sampler counts torch.optim steps; with any other update the masks stay, but Phi is mixed anew."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    mk.MixSampler(model)
    models.run(model, x)
    seeds = models.seeds_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)
    assert models.seeds_of(model) == seeds
    assert torch.equal(model(x), models.reference_run(model, x).output)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, math.nan, "1"])
def test_every_must_be_a_count(every):
    with pytest.raises(ValueError, match=r"MixSampler: every: expected an int >= 1 or math.inf, got"):
        mk.MixSampler(models.with_mixout(models.mlp()), every=every)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.0, True, torch.tensor(1)])
def test_seed_must_be_an_int_of_64_bits(seed):
    with pytest.raises(ValueError, match="MixSampler: seed: expected an int of 64 bits or None, got"):
        mk.MixSampler(models.with_mixout(models.mlp()), seed=seed)


def test_a_model_without_mixout():
    with pytest.raises(ValueError, match=r"MixSampler: model: expected one with mixout layers or graddrop; call apply"):
        mk.MixSampler(models.mlp())


def test_a_model_with_a_sampler():
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model)
    with pytest.raises(ValueError, match=r"MixSampler: model: expected one without a sampler; call remove\(\)"):
        mk.MixSampler(nn.Sequential(model))


@pytest.mark.parametrize("options", [{"premix": "x"}, {"host_targets": 2}], ids=str)
def test_options_must_be_switches(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^MixSampler: {name}: expected True.* or .*, got {value!r}$"):
        mk.MixSampler(models.with_mixout(models.mlp()), **options)


@pytest.mark.parametrize("prefix", [None, 1])
def test_a_prefix_must_be_a_string(prefix):
    with pytest.raises(TypeError, match=f"^MixSampler: prefix: expected a string, got {prefix}$"):
        mk.MixSampler(models.with_mixout(models.mlp()), prefix=prefix)


@pytest.mark.parametrize("share_masks", ["query", ["query", "key"]])
def test_share_masks_must_be_groups(share_masks):
    with pytest.raises(TypeError, match="MixSampler: share_masks: expected groups of names, got the string"):
        mk.MixSampler(models.with_mixout(models.mlp()), share_masks=share_masks)


@pytest.mark.parametrize("state", [{}, {"seed": 1}, {"seed": 1, "step": 2, "every": 3}, None])
def test_a_state_that_is_none(state):
    sampler = mk.MixSampler(models.with_mixout(models.mlp()))
    with pytest.raises(ValueError, match=r"MixSampler\.load_state_dict: state: expected the keys seed and step, got"):
        sampler.load_state_dict(state)


@pytest.mark.parametrize("state", [{"seed": "a", "step": 0}, {"seed": 1, "step": -1}, {"seed": 1, "step": 2.5}])
def test_a_state_of_something_else(state):
    sampler = mk.MixSampler(models.with_mixout(models.mlp()), seed=3)
    with pytest.raises(
        ValueError, match=r"MixSampler\.load_state_dict: state: expected two 64-bit ints, step >= 0, got"
    ):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"seed": 3, "step": 0}


def test_it_says_what_it_is():
    sampler = mk.MixSampler(models.with_mixout(models.attention_net()), seed=3, every=2)
    assert repr(sampler) == (
        "MixSampler(5 layers, 3 masks, every=2, premix=None, host_targets=False, same_on_all_ranks=True, "
        "kept_all_gather=False, {'seed': 3, 'step': 0})"
    )


@pytest.mark.parametrize("arguments", [{"every": 0}, {"seed": 0.5}, {"share_masks": "query"}])
def test_a_refused_sampler_leaves_the_model_without_one(arguments):
    before = followers()
    model = models.with_mixout(models.mlp())
    with pytest.raises((ValueError, TypeError)):
        mk.MixSampler(model, **arguments)
    assert followers() == before
    assert all(layer.slot is None for layer in models.mixed_layers(model).values())


@pytest.mark.parametrize("steps", [-1, 1.5, "1", True])
def test_advance_counts_whole_steps(steps):
    sampler = mk.MixSampler(models.with_mixout(models.mlp()))
    with pytest.raises(ValueError, match=r"^MixSampler\.advance: steps: expected an int >= 0, got "):
        sampler.advance(steps)
    assert sampler.step == 0


def test_a_sampler_is_of_a_model():
    with pytest.raises(TypeError, match=r"^MixSampler: model: expected an nn\.Module, got int$"):
        mk.MixSampler(3)
