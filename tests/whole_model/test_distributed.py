"""DistributedDataParallel over gloo, two processes: one seed for all ranks, or one each; targets are not broadcast."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mixout_kernels as mk

from . import models
from .processes import RANKS, on_each_rank

STEPS = 3


def trained_and_sharded(rank):
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    trained = {same: trained_rank(rank, same, alone) for same in (True, False)}
    return trained, [sharded_rank(sampler_first) for sampler_first in (True, False)]


def trained_rank(rank, same_on_all_ranks, alone):
    """Trains, and gives what this rank saw."""
    model = models.with_mixout(models.attention_net())
    torch.manual_seed(100 + rank)  # ranks have generators of their own, as data loading wants them
    sampler = mk.MixSampler(model, same_on_all_ranks=same_on_all_ranks)
    for layer in models.mixed_layers(model).values():
        layer.target.add_(rank * 0.001)  # a mark: DDP would overwrite it with rank 0's target
    targets = {name: layer.target.clone() for name, layer in models.mixed_layers(model).items()}
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    seen = {"seeds": [], "gradients": [], "local": [], "state": sampler.state_dict()}
    for number in range(STEPS):
        x = models.random_input(RANKS * 4).chunk(RANKS)[rank]
        seen["seeds"].append(models.seeds_of(model))
        copied = copy.deepcopy(model)
        mk.MixSampler(copied, process_group=alone).load_state_dict(sampler.state_dict())
        seen["local"].append(models.run(copied, x).gradients)
        seen["gradients"].append(models.run(model, x, parallel).gradients)
        optimizer.step()
        assert sampler.step == number + 1
    seen["kept_targets"] = all(torch.equal(m.target, targets[n]) for n, m in models.mixed_layers(model).items())
    return seen


def summed_or_averaged():
    """By how much a gradient under FSDP exceeds the mean over ranks, without mixout: torch 2.8 adds them over gloo."""
    whole = torch.nn.Linear(4, 4)
    sharded = fully_shard(copy.deepcopy(whole))
    for layer in (whole, sharded):
        layer(torch.ones(1, 4)).sum().backward()
    ratio = sharded.bias.grad.full_tensor() / whole.bias.grad
    assert torch.equal(ratio, torch.ones(4)) or torch.equal(ratio, torch.full((4,), float(RANKS)))
    return ratio[0].item()


def sharded_rank(sampler_first):
    """Whether a model under FSDP ends with the weights of its unsharded twin, and the most bytes of Phi it held."""
    twin = models.with_mixout(models.attention_net())
    model = copy.deepcopy(twin)
    samplers = [mk.MixSampler(twin, seed=3)]
    if sampler_first:
        samplers.append(mk.MixSampler(model, seed=3, premix=True))
    for layer in (*models.mixed_layers(model).values(), model):
        fully_shard(layer)
    if not sampler_first:
        samplers.append(mk.MixSampler(model, seed=3, premix=True))
    # A power of two: the twin's steps are the same, bit for bit.
    optimizers = [
        torch.optim.SGD(m.parameters(), lr) for m, lr in ((twin, 0.001 * summed_or_averaged()), (model, 0.001))
    ]
    mixed = 0
    for _ in range(STEPS):
        models.run(model, models.random_input())
        mixed = max(mixed, samplers[1].extra_bytes)
        for m, optimizer in zip((twin, model), optimizers, strict=True):
            models.step(m, optimizer, models.random_input())
    assert samplers[0].state_dict() == samplers[1].state_dict()
    if sampler_first:  # whole targets
        with pytest.raises(TypeError, match=r"^track_targets: model: expected a weight and a target that are both wh"):
            mk.track_targets(optimizers[1], model, 0.5)
    mk.remove_mixout(model)
    with pytest.raises(TypeError, match=r"^apply_mixout: model: expected weights that are Parameters, got a D"):
        mk.apply_mixout(model, p=0.5)
    weights = [parameter.full_tensor() for parameter in model.parameters()]
    return all(map(torch.equal, weights, twin.parameters())), mixed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_each_rank(trained_and_sharded, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def ranks(found):
    return [trained for trained, _ in found]


def test_all_ranks_have_the_same_masks_by_default(ranks):
    first, second = (rank[True] for rank in ranks)
    assert first["seeds"] == second["seeds"]
    assert first["state"] == second["state"]


def test_or_independent_ones(ranks):
    first, second = (set().union(*(step.values() for step in rank[False]["seeds"])) for rank in ranks)
    assert not first & second
    assert len(first) == len(second) == 3 * STEPS


@pytest.mark.parametrize("same", [True, False], ids=["same-on-all-ranks", "independent"])
def test_gradients_are_the_mean_over_ranks(ranks, same):
    """Of what each rank computes alone under its masks: DDP and the sampler do not get into each other's way."""
    first, second = (rank[same] for rank in ranks)
    for number in range(STEPS):
        for name, gradient in first["gradients"][number].items():
            assert torch.equal(gradient, second["gradients"][number][name])
            mean = first["local"][number][name] / 2 + second["local"][number][name] / 2
            assert torch.equal(gradient, mean), name


def test_targets_are_not_broadcast(ranks):
    assert all(seen["kept_targets"] for rank in ranks for seen in rank.values())


def test_shards_of_fsdp_train_as_the_whole_model(found):
    """And no whole Phi undoes their saving."""
    for _, sharded in found:
        assert sharded == [(True, 0)] * 2
