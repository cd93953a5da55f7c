"""What counts as an optimizer step, whoever takes it: one mask each, and the weights of it in Phi."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn

import mixout_kernels as mk

from . import models

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_new_mask_after_every_optimizer_step_and_no_sooner(device, optimizer):
    model = models.with_mixout(models.mlp(), device=device)
    sampler = mk.MixSampler(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    previous = None
    for number in range(4):
        seeds = models.seeds_of(model)
        assert seeds != previous
        assert sampler.step == number
        for micro_batch in range(3):  # gradient accumulation: one mask
            model(models.random_input(micro_batch + 2, device=device)).square().mean().backward()
            assert models.seeds_of(model) == seeds
        optimizer.step()
        optimizer.zero_grad()
        previous = seeds


def test_only_an_optimizer_of_the_models_weights_counts():
    model, other = models.with_mixout(models.mlp()), models.mlp()
    sampler = mk.MixSampler(model)
    models.step(other, torch.optim.SGD(other.parameters(), lr=0.01), models.random_input())
    assert sampler.step == 0


def test_weights_that_join_an_optimizer_later_count():
    """Gradual unfreezing: first the head alone, then the body with add_param_group."""
    model = models.with_mixout(torch.nn.Sequential(*models.mlp(), torch.nn.Linear(models.OUT, 2)), exclude=["3"])
    sampler = mk.MixSampler(model)
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.01)
    models.step(model, optimizer, models.random_input())
    assert sampler.step == 0
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()]})
    models.step(model, optimizer, models.random_input())
    assert sampler.step == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_gradscaler_skips_draws_no_new_mask(device, optimizer):
    """A fused optimizer is called all the same, and told of the overflow by a tensor."""
    model = models.with_mixout(models.mlp(), device=device)
    sampler = mk.MixSampler(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler(device)
    steps = 0
    for factor in (1.0, math.inf, 1.0, math.nan, 1.0):
        seeds = models.seeds_of(model)
        optimizer.zero_grad()
        scaler.scale(factor * model(models.random_input(device=device)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps += math.isfinite(factor)
        assert sampler.step == steps
        assert (models.seeds_of(model) != seeds) == math.isfinite(factor)


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
def test_one_of_several_optimizers_counts(premix):
    """And what the others change is mixed all the same."""
    model, x = models.with_mixout(models.attention_net()), models.random_input()
    sampler = mk.MixSampler(model, seed=1, every=2, premix=premix)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.005) for part in model]
    seen = []
    for k in range(4):
        assert torch.equal(models.run(model, x).output, models.reference_run(model, x).output)
        for optimizer in reversed(optimizers):
            optimizer.step()
        seen.append(models.seeds_of(model))
        assert sampler.step == k + 1
    assert seen[0] != seen[1] == seen[2] != seen[3]


class Outer(torch.optim.Optimizer):
    """As SAM, Lookahead and ZeroRedundancyOptimizer: it steps an optimizer of its own, and changes weights again."""

    def __init__(self, parameters, inner):
        super().__init__(parameters, {"lr": 0.1})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.99)


@pytest.mark.parametrize("inner_holds", ["all", "a part", "nothing mixed"])
def test_an_optimizer_within_an_optimizer_is_one_step(inner_holds):
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, seed=1, premix=True)
    parameters = {"all": model.parameters(), "a part": model[2].parameters(), "nothing mixed": [model[0].bias]}
    outer = Outer(model.parameters(), torch.optim.SGD(parameters[inner_holds], lr=0.1))
    for step in range(3):
        assert sampler.step == step
        assert torch.equal(models.run(model, x).output, models.reference_run(model, x).output)
        outer.step()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    plain.step()  # after them, and after a step that failed
    with pytest.raises(TypeError, match="not callable"):
        torch.optim.SGD(model.parameters(), lr=0.1).step(closure=1)
    plain.step()
    assert sampler.step == 5


def test_what_a_parametrization_computes_a_weight_from_counts_as_the_weight():
    model, x = models.with_mixout(models.mlp()), models.random_input()
    for layer in models.mixed_layers(model).values():
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softsign())
    sampler = mk.MixSampler(model, seed=1, premix=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        before, seeds = model[0].weight.clone(), models.seeds_of(model)
        models.step(model, optimizer, x)
        assert (sampler.step, sampler.extra_bytes) == (step + 1, 0)
        assert models.seeds_of(model) != seeds
        assert not torch.equal(model[0].weight, before)


def no_parameters(model):
    """Weights as under FSDP with use_orig_params=False: views of one flat Parameter elsewhere."""
    layers = models.mixed_layers(model).values()
    flat = nn.Parameter(torch.cat([layer.weight.detach().flatten() for layer in layers]))
    start = 0
    for layer in layers:
        shape = layer.weight.shape
        del layer._parameters["weight"]
        layer.weight = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return flat


def test_weights_that_no_optimizer_can_hold():
    model, x = models.with_mixout(models.mlp()), models.random_input()
    flat = no_parameters(model)
    sampler = mk.MixSampler(model, seed=1, premix=True)
    optimizer = torch.optim.SGD([flat, model[0].bias], lr=0.05)
    seeds = models.seeds_of(model)
    models.run(model, x)
    with pytest.warns(UserWarning, match="no Parameters that it could hold .*Call advance"):
        optimizer.step()
    assert models.seeds_of(model) == seeds
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        optimizer.step()
    sampler.advance()
    assert (sampler.step, sampler.extra_bytes) == (1, 0)
    assert models.seeds_of(model) != seeds


def test_a_loop_without_an_optimizer_advances_by_hand():
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, seed=1, premix=True)
    twin = copy.deepcopy(model)
    expected = mk.MixSampler(twin, seed=1, premix=True)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        models.run(model, x).assert_same_bits(models.run(twin, x))
        optimizer.step()
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.1)  # unseen by autograd's version counter
        sampler.advance()
    assert sampler.state_dict() == expected.state_dict() == {"seed": 1, "step": 3}
