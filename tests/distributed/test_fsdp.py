"""FSDP2 with sharded targets, two processes over gloo: the steps of one process, bit for bit."""

import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..whole_model import models
from ..whole_model.processes import on_each_rank
from .sharded import Twins, mlp

SAME = {"losses": True, "gradients": True}


def trains(optimizer=torch.optim.SGD, micro=1, autocast=False, **options):
    twins = Twins(**options)
    twins.optimize(optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return twins.train(micro=micro), twins.target_bytes()


def conv1d():
    """Whose rows are input features: each rank has a part of the mask."""
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(41, 47), nn.GELU(), Conv1D(8, 41))


CASES = {
    "mlp": functools.partial(trains),
    "siblings": functools.partial(trains, build=models.attention_net, p=0.7),
    "AdamW": functools.partial(trains, build=models.attention_net, optimizer=torch.optim.AdamW),
    "one unit": functools.partial(trains, units=lambda model: []),
    "uneven rows": functools.partial(trains, build=functools.partial(mlp, 48, 41, 9)),
    "fewer rows than ranks": functools.partial(trains, build=functools.partial(mlp, 48, 40, 1)),
    "weight masks": functools.partial(trains, build=functools.partial(mlp, 45, 41, 9), mask="weight"),
    "output masks": functools.partial(trains, build=functools.partial(mlp, 45, 41, 9), mask="output"),
    "resharded after forward": functools.partial(trains, reshard_after_forward=True),
    "not resharded after forward": functools.partial(trains, reshard_after_forward=False),
    "accumulation": functools.partial(trains, micro=3),
    "Conv1D": functools.partial(trains, build=conv1d),
    "Conv1D, weight masks": functools.partial(trains, build=conv1d, mask="weight"),
    "autocast": functools.partial(trains, build=models.attention_net, autocast=True),
    "bfloat16 targets": functools.partial(trains, target_dtype=torch.bfloat16),
    "frozen weights": functools.partial(
        trains, build=models.attention_net, freeze=("0", "1.key"), units=lambda model: []
    ),
    "p = 1": functools.partial(trains, p=1.0),
}


def every_case(rank):
    return {name: case() for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_each_rank(every_case, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_steps_of_one_process(found, name):
    assert [rank[name][0] for rank in found] == [SAME, SAME]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_has_its_part_of_the_targets(found, name):
    ranks = [rank[name][1] for rank in found]
    whole = ranks[0][1]
    assert sum(part for part, _ in ranks) == whole
