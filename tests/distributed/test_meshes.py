"""Four processes: FSDP2 over a mesh with replicas, tensor parallelism, both, and a checkpoint for another mesh."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mixout_kernels as mk
from mixout_kernels import backends
from mixout_kernels.pieces import local

from ..whole_model import models
from ..whole_model.processes import on_each_rank
from .sharded import Twins, error_of, full, layers, mlp, resumed_from, save

SAME = {"losses": True, "gradients": True}
PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}
RANKS = 4


def replicas(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    twins = Twins(models.attention_net, p=0.7, mesh=mesh)
    return twins.train(), [rank_bytes / whole for rank_bytes, whole in [twins.target_bytes()]]


def four_shards(rank, folder):
    twins = Twins(functools.partial(mlp, 48, 41, 3), p=0.7)
    return twins.train(), error_of(lambda: Twins(reshard_after_forward=2))


def resumed_over_more_ranks(rank, folder):
    """Saved where two ranks hold the shards, loaded where four do."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    saved = Twins(models.attention_net, p=0.7, mesh=mesh)
    saved.optimize(torch.optim.AdamW)
    saved.train(steps=2)
    save(saved, folder)
    return resumed_from(folder, saved).train(steps=2)


def tensor_parallel(rank, folder, *, mask="neuron", fsdp=False, sampler_first=False, bias=True, **sampler):
    """The worst relative error of outputs and of gradients in three steps, and the part of the targets."""
    backends.load("cpu")._HAS_PRODUCT = False
    names = ("data", "tensor")
    mesh = init_device_mesh("cpu", (2, 2) if fsdp else (1, 4), mesh_dim_names=names)
    build = models.mlp if bias else without_biases
    alone = models.with_mixout(build(), p=0.7, mask=mask)
    model = copy.deepcopy(alone)
    mk.MixSampler(alone, seed=3)
    if sampler_first:
        mk.MixSampler(model, seed=3, **sampler)
    parallelize_module(model, mesh["tensor"], PLAN)
    if fsdp:
        for unit in (*layers(model), model):
            fully_shard(unit, mesh=mesh["data"])
    if sampler_first:
        mk.shard_targets(model)
    else:
        mk.MixSampler(model, seed=3, **sampler)
    whole, parts = (sum(local(layer.target).nbytes for layer in layers(m)) for m in (alone, model))
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (alone, model)]
    errors = []
    for _ in range(3):
        outputs = [full(m.train()(models.random_input())) for m in (alone, model)]
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        pairs = [
            outputs,
            *((p.grad, full(q.grad)) for p, q in zip(alone.parameters(), model.parameters(), strict=True)),
        ]
        errors += [((ours - expected).norm() / expected.norm()).item() for expected, ours in pairs]
        for optimizer in optimizers:
            optimizer.step()
    evaluated = [full(m.eval()(models.random_input())) for m in (alone, model)]
    return max(*errors, error_in(*evaluated)), parts / whole


def worst_error(outputs, alone, model):
    gradients = zip((p.grad for p in alone.parameters()), (full(p.grad) for p in model.parameters()), strict=True)
    return max(error_in(expected, found) for expected, found in [outputs, *gradients])


def error_in(expected, found):
    """In the 2-norm, relative."""
    return ((found - expected).norm() / expected.norm()).item()


def without_biases():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 40, bias=False), nn.GELU(), nn.Linear(40, 8, bias=False))


def sequence_parallel(rank, folder):
    """Another layout of inputs and outputs: the plan's own redistribution goes on working."""
    mesh = init_device_mesh("cpu", (4,))
    plan = {
        "0": ColwiseParallel(input_layouts=Shard(0)),
        "2": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    alone = models.with_mixout(without_biases(), p=0.5)
    model = parallelize_module(copy.deepcopy(alone), mesh, plan)
    for m in (alone, model):
        mk.MixSampler(m, seed=3)
    x = models.random_input(rows=8)
    outputs = alone(x), full(model(x.chunk(4)[rank]))
    for output in outputs:
        output.square().mean().backward()
    return worst_error(outputs, alone, model)


def refused(rank, folder):
    mesh = init_device_mesh("cpu", (4,))

    def planned(placements, mesh=mesh):
        model = models.with_mixout(models.mlp())
        weight = distribute_tensor(model[0].weight.detach(), mesh, placements)
        model[0].weight = nn.Parameter(weight)
        return model

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    colwise = models.with_mixout(models.mlp())
    parallelize_module(colwise, mesh, PLAN)
    return [
        error_of(lambda: mk.MixSampler(planned([Replicate()]))),
        error_of(lambda: mk.MixSampler(planned([Shard(0), Shard(1)], grid))),
        error_of(lambda: mk.MixSampler(planned([Shard(0)]), same_on_all_ranks=False)),
        error_of(lambda: colwise(torch.ones(2, 48))),
    ]


CASES = {
    "replicas": replicas,
    "four shards": four_shards,
    "resumed": resumed_over_more_ranks,
    "tensor": tensor_parallel,
    "tensor, weight masks": functools.partial(tensor_parallel, mask="weight"),
    "tensor, no biases": functools.partial(tensor_parallel, bias=False),
    "tensor, sampler first": functools.partial(tensor_parallel, sampler_first=True),
    "both": functools.partial(tensor_parallel, fsdp=True),
    "both, weight masks": functools.partial(tensor_parallel, fsdp=True, mask="weight"),
    "sequence": sequence_parallel,
    "refused": refused,
}


def every_case(rank, folder):
    return {name: case(rank, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = on_each_rank(functools.partial(every_case, folder=str(folder)), folder, RANKS)
    return lambda name: [rank[name] for rank in ranks]


def test_shards_and_replicas(found):
    assert found("replicas") == [(SAME, [0.5])] * RANKS


def test_four_shards(found):
    """Of 41 and of 3 rows; and what cannot gather Phi from a part of them."""
    for trained, message in found("four shards"):
        assert trained == SAME
        assert message.startswith(
            "NotImplementedError: MixSampler: model: expected reshard_after_forward=True or False"
        )


def test_a_checkpoint_for_more_ranks(found):
    assert found("resumed") == [SAME] * RANKS


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("tensor", "both"))])
def test_tensor_parallelism(found, name):
    """Sums over ranks are in another order than those of one process."""
    for error, part in found(name):
        assert error < 4 * torch.finfo(torch.float32).eps
        assert part == 1 / RANKS


def test_sequence_parallelism(found):
    for error in found("sequence"):
        assert error < 4 * torch.finfo(torch.float32).eps


def test_other_plans_are_refused(found):
    for replicated, grid, own_masks, without_sampler in found("refused"):
        expected = "NotImplementedError: MixSampler: model: expected '0' to be a Linear with the plan ColwiseParallel"
        assert replicated.startswith(expected)
        assert "Replicate()" in replicated
        assert grid.startswith(expected)
        assert grid.endswith("over a mesh of 2 x 2")
        assert own_masks.startswith("ValueError: MixSampler: model: expected whole targets, and no tensor parallelism")
        assert without_sampler.startswith(
            "RuntimeError: MixLinear: a layer whose weight or target is a DTensor needs a"
        )
