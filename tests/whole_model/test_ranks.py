"""What the ranks of a group agree on when a sampler is made, and what they refuse."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mixout_kernels as mk

from . import models
from .processes import RANKS, on_each_rank


def raised(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def given_seed(rank, alone):
    """Which masks a rank gets is a function of (seed, rank)."""
    seeds = {}
    for same in (True, False):
        model = models.with_mixout(models.mlp())
        mk.MixSampler(model, seed=7 + rank, same_on_all_ranks=same)
        seeds[same] = models.seeds_of(model)
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, seed=7 + rank, process_group=alone)
    seeds["alone"] = models.seeds_of(model)
    return seeds


def another_target(rank, alone):
    messages = []
    for change in ("value", "order", "None"):
        model = models.with_mixout(models.attention_net())
        target = model[1].key.target
        if rank == 1 and change == "value":
            target[3, 4] += 1e-6
        elif rank == 1 and change == "order":
            target.copy_(target.flip(0))
        elif rank == 1:
            model[1].key.target = None
        messages.append(raised(lambda model=model: mk.MixSampler(model)))
        assert all(layer.slot is None for layer in models.mixed_layers(model).values())
    mk.MixSampler(model, process_group=alone)
    return messages


def targets_on_meta(rank, alone):
    """As accelerate's cpu_ram_efficient_loading leaves a model on every rank but the first."""
    model = models.with_mixout(models.mlp())
    if rank == 1:
        model.to("meta")
    return raised(lambda: mk.MixSampler(model))


def a_stage_without_mixed_layers(rank, alone):
    model = models.mlp() if rank == 0 else models.with_mixout(models.mlp())
    begin = time.monotonic()
    message = raised(lambda: mk.MixSampler(model, seed=5))
    return message, time.monotonic() - begin, models.seeds_of(model)


def stages(rank, alone):
    """Of one model, whose layers keep their names; and of two that are numbered from 0 each."""
    seeds = {}
    whole = nn.ModuleDict({str(number): nn.Linear(models.IN, models.IN) for number in range(4)})
    for number in [n for n in list(whole) if int(n) // 2 != rank]:
        del whole[number]
    for name, options in {"named": {}, "prefix": {"prefix": f"stages.{rank}."}, "none": {}}.items():
        stage = models.with_mixout(whole if name == "named" else nn.Sequential(*whole.values()))
        mk.MixSampler(stage, seed=3, process_group=alone, **options)
        seeds[name] = list(models.seeds_of(stage).values())
        mk.remove_mixout(stage)
    return seeds


CASES = [given_seed, another_target, targets_on_meta, a_stage_without_mixed_layers, stages]


def every_case(rank):
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    found = {case.__name__: case(rank, alone) for case in CASES}
    foreign = dist.new_group([0])
    found["foreign"] = raised(lambda: mk.MixSampler(models.with_mixout(models.mlp()), process_group=foreign))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    ranks = on_each_rank(every_case, tmp_path_factory.mktemp("ranks"))
    return lambda case: [rank[getattr(case, "__name__", case)] for rank in ranks]


def test_a_given_seed(found):
    first, second = found(given_seed)
    assert first[True] == second[True] == first["alone"]
    values = [set(seeds.values()) for seeds in (first[True], first[False], second[False], second["alone"])]
    assert first[False] == first[True]  # rank 0 of a group with seeds of their own has the seed itself
    assert len(set().union(*values)) == 2 + 2 + 2


def test_different_targets_are_an_error_on_every_rank(found):
    expected = "expected the same target of '1.key' on every rank, got different ones on ranks 0 and 1"
    for messages in found(another_target):
        assert [message.split(": ")[:3] for message in messages] == [["MixSampler", "model", expected]] * 3


def test_a_target_without_values_is_an_error_on_every_rank(found):
    for message in found(targets_on_meta):
        assert message.startswith(
            "MixSampler: model: expected the target of '0' in memory on every rank, got one on the meta device on "
        )


def test_a_stage_without_mixed_layers_keeps_nobody_waiting(found):
    """The others have their sampler, with the seed of the group's first process."""
    (without, seconds, _), (message, other_seconds, seeds) = found(a_stage_without_mixed_layers)
    assert without.startswith("MixSampler: model: expected one with mixout layers or graddrop")
    assert message is None
    assert max(seconds, other_seconds) < 60
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, seed=5)
    assert seeds == models.seeds_of(model)


def test_stages_of_a_pipeline_have_masks_of_their_own(found):
    """By the names that their layers have in the whole model, or by a prefix where a stage numbers them anew."""
    first, second = found(stages)
    assert len({*first["named"], *second["named"]}) == 4
    assert len({*first["prefix"], *second["prefix"]}) == 4
    assert first["none"] == second["none"]


def test_a_group_of_others(found):
    assert found("foreign") == [None, "MixSampler: process_group: expected a group that this process is in"]


def test_a_group_without_processes():
    with pytest.raises(ValueError, match=r"^MixSampler: process_group: expected None where torch\.distributed is not"):
        mk.MixSampler(models.with_mixout(models.mlp()), process_group=object())


def test_names_do_not_hang_on_wrappers():
    """A run may be resumed with another engine around the model: the masks stay."""

    def seeds(wrap):
        model = models.with_mixout(models.attention_net())
        mk.MixSampler(wrap(model), seed=3)
        return models.seeds_of(model)

    def compile_layers(model):
        model[1] = torch.compile(model[1])
        return model

    expected = list(seeds(lambda model: model).values())
    for wrap in (nn.DataParallel, torch.compile, compile_layers):
        assert list(seeds(wrap).values()) == expected, wrap
