"""DistributedDataParallel over gloo, two processes: one seed for all ranks, or one each; targets are not broadcast."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mixout_kernels as mk

from . import models

RANKS, STEPS = 2, 3


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen = {same: trained_rank(rank, same) for same in (True, False)}
    torch.save(seen, f"{folder}/rank-{rank}.pt")
    torch.save([sharded_rank(sampler_first) for sampler_first in (True, False)], f"{folder}/sharded-{rank}.pt")
    dist.barrier()  # a rank that leaves early aborts the other
    dist.destroy_process_group()


def trained_rank(rank, same_on_all_ranks):
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
        alone = copy.deepcopy(model)
        mk.MixSampler(alone, seed=sampler.state_dict()["seed"]).load_state_dict(sampler.state_dict())
        seen["local"].append(models.run(alone, x).gradients)
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
    for follow in (mk.decay_to_target, mk.track_targets):
        with pytest.raises(TypeError, match=f"^{follow.__name__}: model: expected whole weights, got a DTensor"):
            follow(optimizers[1], model, 0.5)
    mk.remove_mixout(model)
    with pytest.raises(TypeError, match=r"^apply_mixout: model: expected weights that are Parameters, got a D"):
        mk.apply_mixout(model, p=0.5)
    weights = [parameter.full_tensor() for parameter in model.parameters()]
    return all(map(torch.equal, weights, twin.parameters())), mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.start_processes(
        worker, (str(folder),), nprocs=RANKS, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 120
    while not context.join(timeout=deadline - time.monotonic()):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two processes did not finish in 120 s")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


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


def test_shards_of_fsdp_train_as_the_whole_model(folder):
    """And no whole Phi undoes their saving."""
    for rank in range(RANKS):
        assert torch.load(folder / f"sharded-{rank}.pt") == [(True, 0)] * 2


def test_one_given_seed_is_independent_by_rank(monkeypatch):
    """Which masks a rank gets is a function of (seed, rank)."""

    def seeds(rank):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        model = models.with_mixout(models.mlp())
        mk.MixSampler(model, seed=7, same_on_all_ranks=False)
        return models.seeds_of(model)

    assert seeds(0) == seeds(0) != seeds(1) == seeds(1)
