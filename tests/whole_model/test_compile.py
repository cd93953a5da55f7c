"""torch.compile over a whole model with a sampler: new masks after each step without a new compilation, as in eager."""

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mixout_kernels as mk

from . import models


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Twins:
    """A model to compile and its eager copy, with the same sampler seed."""

    def __init__(self, device, **options):
        self.model = models.with_mixout(models.attention_net(), device=device)
        self.eager = copy.deepcopy(self.model)
        self.sampler, self.eager_sampler = (mk.MixSampler(m, seed=5, **options) for m in (self.model, self.eager))
        self.optimizer, self.eager_optimizer = (
            torch.optim.SGD(m.parameters(), lr=0.001) for m in (self.model, self.eager)
        )

    def assert_same_step(self, x, call=None):
        """One training step of both: the same masks, outputs and gradients, to the last bit."""
        assert models.seeds_of(self.model) == models.seeds_of(self.eager)
        models.run(self.model, x, call).assert_same_bits(models.run(self.eager, x))
        self.optimizer.step()
        self.eager_optimizer.step()


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
def test_trains_as_the_eager_model(device, premix):
    twins, x = Twins(device, premix=premix), models.random_input(device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twins.model, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(4):
        seen.update(models.seeds_of(twins.model).values())
        twins.assert_same_step(x, compiled)
    assert len(seen) == 4 * 3  # query, key and value share one
    assert counter.frame_count == 1


def test_inductor(device):
    twins, x = Twins(device), models.random_input(device=device)
    compiled = torch.compile(twins.model, fullgraph=True)
    for _ in range(2):
        torchs, truth = models.reference_run(twins.model, x), models.reference_run(twins.model, x, torch.float64)
        models.assert_in_budget(models.run(twins.model, x, compiled), torchs, truth)
        twins.optimizer.step()


def test_eager_and_compiled_calls_in_turns(device):
    """Validation in eager mode between compiled steps, say: neither leaves anything stale for the other."""
    twins, x = Twins(device), models.random_input(device=device)
    compiled = torch.compile(twins.model, fullgraph=True, backend="aot_eager")
    for number in range(4):
        twins.assert_same_step(x, compiled if number % 2 else None)


@pytest.mark.parametrize("every", [2, math.inf])
def test_every(device, every):
    twins, x = Twins(device, every=every), models.random_input(device=device)
    compiled = torch.compile(twins.model, fullgraph=True, backend="aot_eager")
    for number in range(4):
        before = models.seeds_of(twins.model)
        twins.assert_same_step(x, compiled)
        assert (models.seeds_of(twins.model) != before) == (every == 2 and number % 2 == 1)


def test_a_compiled_step():
    """Model, loss, backward and optimizer in one compiled function: torch breaks its graph at backward() and at the
    optimizer's hooks, and the masks advance once a call all the same."""
    twins, x = Twins("cpu"), models.random_input()

    def step(x):
        loss = twins.model(x).square().mean()
        loss.backward()
        twins.optimizer.step()
        twins.optimizer.zero_grad()
        return loss

    compiled = torch.compile(step, backend="aot_eager")
    for number in range(3):
        assert models.seeds_of(twins.model) == models.seeds_of(twins.eager)
        expected = twins.eager(x).square().mean()
        models.step(twins.eager, twins.eager_optimizer, x)
        assert torch.equal(compiled(x), expected)
        assert twins.sampler.step == number + 1
    for parameter, eager in zip(twins.model.parameters(), twins.eager.parameters(), strict=True):
        torch.testing.assert_close(parameter, eager)
