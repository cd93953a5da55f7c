"""Activation checkpointing under a sampler: the recomputed forward has the same masks, the gradients the same bits."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import mixout_kernels as mk

from . import models
from .transformers_models import MODELS, inputs, make


def net(premix):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(models.IN, models.IN), models.Attention(), nn.Tanh(), nn.Linear(models.IN, 8))
    model = models.with_mixout(model)
    mk.MixSampler(model, premix=premix)
    return model


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved"])
@pytest.mark.parametrize("preserve", [True, False], ids=["", "without-generator-state"])
def test_gradients_equal_those_without(premix, use_reentrant, preserve):
    """A sampler's masks do not depend on the generator, so its state need not be kept."""
    model, x = net(premix), models.random_input().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve}
    for _ in range(2):
        expected = models.run(model, x)
        models.run(model, x, lambda x: checkpoint(model, x, **options)).assert_same_bits(expected)
        models.run(model, x, lambda x: checkpoint_sequential(model, 2, x, **options)).assert_same_bits(expected)
        optimizer.step()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_gradient_checkpointing(name, use_reentrant):
    model, x = models.with_mixout(make(name)), inputs(name)
    mk.MixSampler(model)
    expected = models.run(model, x)
    backbone = model.model
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    forwards = []
    first = next(iter(models.mixed_layers(model).values()))
    first.register_forward_pre_hook(lambda *_: forwards.append(1))
    models.run(model, x).assert_same_bits(expected)
    assert len(forwards) == 2  # it was recomputed
