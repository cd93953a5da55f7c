"""A whole training step in one CUDA graph: every replay draws new masks and mixes the weights of its step."""

import copy

import pytest
import torch

import mixout_kernels as mk

from .. import axes
from . import models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: CUDA graphs")


class Step:
    """forward, backward, optimizer, and with them the sampler's draw and mix."""

    def __init__(self, model, **options):
        self.model = model
        self.sampler = mk.MixSampler(model, seed=9, **options)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
        self.x = models.random_input().cuda()

    def __call__(self):
        self.optimizer.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def captured(self, warm_up=3):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self.loss = self()
        return graph


@pytest.mark.parametrize("options", [{}, {"premix": False}, {"host_targets": True}], ids=str)
@axes.masks
def test_replays_equal_eager_steps(mask, options):
    model = models.with_mixout(models.attention_net(), mask=mask, device="cuda")
    eager, step = Step(copy.deepcopy(model), **options), Step(model, **options)
    for _ in range(3):
        eager()
    graph = step.captured(warm_up=3)
    seeds = set()
    for k in range(5):
        loss = eager()
        graph.replay()
        assert step.sampler.step == eager.sampler.step == 4 + k
        assert models.seeds_of(step.model) == models.seeds_of(eager.model)
        seeds.add(models.seeds_of(step.model)["0"])
        torch.testing.assert_close(step.loss, loss, rtol=1e-4, atol=1e-6)
    assert len(seeds) == 5
