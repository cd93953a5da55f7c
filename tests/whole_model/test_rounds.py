"""Steps of several optimizers, of none that can be seen, and steps that are none."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import mixout_kernels as mk

from . import models

X = models.random_input()


def trained(model, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(X).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def sgd(*modules, **options):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.01, **options)


def test_two_optimizers_with_a_half_of_the_layers_each():
    """One step for each time that both have stepped, in whichever order."""
    model = models.with_mixout(models.attention_net())
    sampler = mk.MixSampler(model, seed=1)
    first, second = sgd(model[0], model[1].query), sgd(model[1].key, model[1].value, model[2])
    for number, order in enumerate([(first, second), (second, first), (second, first), (first, second)]):
        assert sampler.step == number
        trained(model, *order)


def test_an_optimizer_that_steps_less_often():
    model = models.with_mixout(models.attention_net())
    sampler = mk.MixSampler(model, seed=1)
    often, seldom = sgd(model[0], model[1]), sgd(model[2])
    for number in range(6):
        assert sampler.step == number
        trained(model, often, *[seldom] * (number % 3 == 2))


def test_an_optimizer_that_stays_alone():
    model = models.with_mixout(models.attention_net())
    sampler = mk.MixSampler(model, seed=1)
    first, second = sgd(model[0], model[1]), sgd(model[2])
    trained(model, first, second)
    for number in range(3):
        assert sampler.step == number + 1
        trained(model, second)


@pytest.mark.parametrize("left_out", [0, 2])
def test_an_optimizer_that_leaves_a_layer_out(left_out):
    model = models.with_mixout(models.attention_net())
    sampler = mk.MixSampler(model, seed=1)
    optimizer = sgd(*(part for number, part in enumerate(model) if number != left_out))
    for number in range(3):
        seeds = models.seeds_of(model)
        trained(model, optimizer)
        assert sampler.step == number + 1
        assert models.seeds_of(model) != seeds


def test_layers_that_are_frozen_and_thawed():
    """Masks go on with the optimizer's steps, whichever of its weights are trained."""
    model = models.with_mixout(models.attention_net())
    sampler = mk.MixSampler(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number, frozen in enumerate([(0, 1), (0,), (), (2,)]):
        for part, module in enumerate(model):
            module.requires_grad_(part not in frozen)
        trained(model, optimizer)
        assert sampler.step == number + 1
        assert torch.equal(models.run(model, X).output, models.reference_run(model, X).output)


def test_a_weight_that_is_replaced():
    """The optimizer is given the new one; the sampler looks for what it holds."""
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1)
    optimizer = sgd(model[0])
    trained(model, optimizer)
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    model[0].bias.requires_grad_(False)
    trained(model, optimizer)
    assert sampler.step == 1  # it stepped the old weight, which is no longer the layer's
    optimizer.param_groups[0]["params"] = list(model[0].parameters())
    trained(model, optimizer)
    assert sampler.step == 2


def test_a_step_without_gradients_is_none():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.step()
    assert (sampler.step, sampler.draws) == (0, 0)
    trained(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert (sampler.step, sampler.draws) == (1, 1)


class WithoutGradients(torch.optim.Optimizer):
    """As MeZO: it changes weights and asks for no gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 0.99)


def test_an_optimizer_that_needs_no_gradients():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1)
    optimizer = WithoutGradients(model.parameters(), {})
    for number in range(3):
        assert sampler.step == number
        optimizer.step()


def test_an_optimizer_with_a_closure():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    for number in range(2):
        assert sampler.step == number
        optimizer.step(closure)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_a_checkpoint_of_an_optimizer_is_no_step(optimizer, lr):
    """torch.distributed.checkpoint takes one, without gradients and with lr 0, to have a state to describe."""
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1, premix=True)
    optimizer = optimizer(model.parameters(), lr=lr)
    mk.track_targets(optimizer, model, 0.5)
    models.run(model, X)
    optimizer.zero_grad()
    before = [layer.target.clone() for layer in models.mixed_layers(model).values()]
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, state)
    assert (sampler.step, sampler.draws) == (0, 0)
    assert all(map(torch.equal, before, (layer.target for layer in models.mixed_layers(model).values())))
    trained(model, optimizer)
    assert sampler.step == 1
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    optimizer.zero_grad()
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    assert sampler.step == 1
    assert torch.equal(models.run(model, X).output, models.reference_run(model, X).output)


def test_a_warm_up_from_0_begins_with_a_step():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1)
    trained(model, torch.optim.AdamW(model.parameters(), lr=0.0))
    assert sampler.step == 1


class StepsACopy:
    """DeepSpeed's ZeRO-1 and 2, in plain torch: weights are views of a flat buffer, and a copy of it is stepped."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters])
        start = 0
        for parameter in self.parameters:
            parameter.data = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.master = self.flat.clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.master], lr=0.5)

    def step(self):
        self.master.grad = torch.cat([p.grad.flatten() for p in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        self.optimizer.step()
        self.flat.data.copy_(self.master.data)  # autograd's version counter does not see it


def test_weights_of_which_copies_are_stepped():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1, premix=True)
    engine = StepsACopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            model(X).square().mean().backward()
            engine.step()
    (message,) = (str(warning.message) for warning in said)
    assert "none holds a mixed weight (DeepSpeed ZeRO" in message
    assert "Call advance() after each step" in message
    assert sampler.step == 0
    for number in range(3):
        sampler.advance()
        assert sampler.step == number + 1
        assert torch.equal(models.run(model, X).output, models.reference_run(model, X).output)
        engine.step()


def test_no_word_where_steps_are_counted_by_hand():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=1)
    engine = StepsACopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            model(X).square().mean().backward()
            engine.step()
            sampler.advance()


def test_optimizers_of_other_models_are_nobodys_business():
    """A step of another one without a forward of this model in between, or before one that holds its weights."""
    model, other = models.with_mixout(models.mlp()), models.mlp()
    mk.MixSampler(model, seed=1)
    optimizer, stranger = sgd(model), sgd(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            trained(other, stranger)
        for _ in range(10):
            trained(model, optimizer)
            trained(other, stranger)


def test_forwards_without_a_step(monkeypatch):
    monkeypatch.setattr(mk.sampler.steps, "FORWARDS_WITHOUT_STEP", 8)
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model, seed=1)
    parameters = list(model.parameters())
    said = []
    for number in range(20):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gradients = torch.autograd.grad(model(X).square().mean(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.data.sub_(gradient, alpha=0.01)
        said += [(number, str(warning.message)) for warning in caught]
    ((number, message),) = said
    assert number == 7
    assert message.startswith(
        "MixSampler: 8 training forwards, and no step of a torch.optim optimizer that holds a mixed"
    )


def test_forwards_that_train_nothing_are_not_counted(monkeypatch):
    """Evaluation, looks without gradients, frozen layers, and all that follow a step."""
    monkeypatch.setattr(mk.sampler.steps, "FORWARDS_WITHOUT_STEP", 2)
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, seed=1)
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model.eval()(X)
            with torch.no_grad():
                model.train()(X)
        model.requires_grad_(False)
        for _ in range(5):
            model(X)
        model.requires_grad_(True)
        trained(model, optimizer)
        for _ in range(5):
            model(X)


@pytest.mark.parametrize(("in_eval_mode", "warns"), [(2, False), (5, True)])
def test_a_model_that_is_trained_in_eval_mode(in_eval_mode, warns):
    """As from_pretrained leaves it. Once it was trained in training mode, the mode is the user's own business."""
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, seed=1)
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for training in [False] * in_eval_mode + [True] + [False] * 5:
            trained(model.train(training), optimizer)
    messages = [str(warning.message) for warning in caught]
    expected = "MixSampler: 3 optimizer steps, and every mixed layer is in eval mode"
    assert [message[: len(expected)] for message in messages] == [expected] * warns


def test_a_copy_without_a_sampler_has_nothing_to_say():
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, seed=1)
    twin = copy.deepcopy(model)
    trained(twin, sgd(twin))
    assert all(layer.slot is None for layer in models.mixed_layers(twin).values())
