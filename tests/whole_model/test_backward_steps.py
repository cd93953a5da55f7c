"""Optimizers that step within backward, one for each Parameter: gradients are those of the forward's masks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mixout_kernels as mk

from . import models
from .transformers_models import MODELS, inputs, make


def in_backward(model, lr=0.001):
    """torch's recipe: a hook of each Parameter steps an optimizer of its own, and drops the gradient."""
    optimizers = {p: torch.optim.SGD([p], lr=lr) for p in model.parameters() if p.requires_grad}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)


class LastFirst(nn.Module):
    """The sibling that is registered first is called last, so that its backward comes before the others'."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(models.IN, models.IN) for _ in range(3))

    def forward(self, x):
        value = self.value(x)
        return torch.tanh(self.query(self.key(x) + value))


def last_first():
    torch.manual_seed(0)
    return nn.Sequential(LastFirst(), nn.Linear(models.IN, 8))


def recomputed(use_reentrant):
    """Segment by segment: each reentrant one has a backward of its own, within that of the whole model."""

    def call(model, x):
        for segment in model:
            x = checkpoint(segment, x, use_reentrant=use_reentrant)
        return x

    return call


CALLS = {
    "plain": lambda model, x: model(x),
    "recomputed": recomputed(False),
    "recomputed-reentrant": recomputed(True),
}


def assert_trains_as_after_backward(model, x, call, premix, steps=4):
    """Weights, masks and steps of a twin whose one optimizer steps after backward, bit for bit."""
    twin = copy.deepcopy(model)
    sampler, twin_sampler = (mk.MixSampler(m, seed=5, premix=premix) for m in (model, twin))
    in_backward(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.001)
    for number in range(steps):
        assert models.seeds_of(model) == models.seeds_of(twin)
        assert sampler.step == twin_sampler.step == number
        call(model, x).square().sum().backward()
        optimizer.zero_grad()
        twin(x).square().sum().backward()
        optimizer.step()
        for name, parameter in twin.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), (number, name)


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("net", [models.attention_net, last_first], ids=["", "last-first"])
def test_trains_as_an_optimizer_after_backward(net, call, premix):
    x = models.random_input().requires_grad_()
    assert_trains_as_after_backward(models.with_mixout(net()), x, CALLS[call], premix)


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name, premix):
    model = models.with_mixout(make(name))
    assert_trains_as_after_backward(model, inputs(name), CALLS["plain"], premix, steps=2)


def test_every_micro_batch_is_a_step():
    """There is no accumulation where each backward steps."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, seed=5)
    in_backward(model)
    seen = set()
    for number in range(3):
        assert sampler.step == number
        seen.update(models.seeds_of(model).values())
        model(x).square().sum().backward()
    assert len(seen) == 6


def test_a_backward_that_fails_half_way():
    """What was stepped until then is one step, settled with the next one."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, seed=5, premix=True)
    in_backward(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model[0].register_full_backward_pre_hook(fail)
    y = model(x)
    with pytest.raises(RuntimeError, match="out of memory"):
        y.square().sum().backward()
    handle.remove()
    assert sampler.step == 0
    assert torch.equal(model(x), models.reference_run(model, x).output)  # the new weights under the old masks
    model(x).square().sum().backward()
    assert sampler.step == 2
    assert torch.equal(model(x), models.reference_run(model, x).output)
