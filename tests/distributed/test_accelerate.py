"""accelerate's and transformers' own preparation of a model for FSDP2, on two processes.

Both take FSDP for something of GPUs: here they are told that there are several, and find CPUs.
"""

import copy
import functools
import os

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels.pieces import is_distributed

from ..whole_model.processes import RANKS, on_each_rank
from ..whole_model.transformers_models import NO_DROPOUT, SMALL
from .sharded import LR, all_of, full, layers, ratio

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


def as_if_on_gpus(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.PartialState(cpu=True)
    pretend_gpus()


def pretend_gpus():
    accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=50, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return {"input_ids": torch.randint(0, 50, (4, 6), generator=generator), "labels": torch.tensor([0, 1, 0, 1])}


def accelerated(rank, efficient):
    """Three steps beside those of one process."""
    as_if_on_gpus(rank)
    alone = bert()
    model = copy.deepcopy(alone)
    if efficient and rank > 0:
        with torch.no_grad():
            for parameter in model.parameters():  # which accelerate overwrites with those of the first rank
                parameter.zero_()
    for m in (alone, model):
        mk.apply_mixout(m, p=0.7)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=efficient,
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    optimizers = [torch.optim.SGD(alone.parameters(), LR * ratio()), torch.optim.SGD(model.parameters(), LR)]
    model, optimizers[1] = accelerator.prepare(model, optimizers[1])
    if efficient:
        mk.shard_targets(model, from_weights=True)
    mk.MixSampler(alone, seed=3)
    mk.MixSampler(model, seed=3)
    same = []
    for number in range(3):
        losses = [m.train()(**batch(number)).loss for m in (alone, model)]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        same.append(torch.equal(*losses))
    weights = zip(alone.parameters(), model.parameters(), strict=True)
    return same, all_of(torch.equal(a, full(b)) for a, b in weights), [is_distributed(m.target) for m in layers(model)]


def trained(rank, folder, *, sampler_first):
    """By Trainer, whose callback shards the targets; or makes the sampler once the model is sharded."""
    as_if_on_gpus(rank)
    model = bert()
    pretrained = f"{folder}/pretrained-{rank}.pt"
    torch.save(model.state_dict(), pretrained)
    mk.apply_mixout(model, p=0.7)

    def make_sampler(model):
        mk.shard_targets(model, targets=pretrained)
        return mk.MixSampler(model, seed=3)

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        fsdp=True,
        fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]},
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    assert arguments.device.type == "cpu"  # asked for, it sets the state up anew
    pretend_gpus()
    data = [{"input_ids": torch.randint(1, 50, (6,)), "labels": number % 2} for number in range(12)]
    callback = mk.MixSamplerCallback(mk.MixSampler(model, seed=3) if sampler_first else make_sampler)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    before = [full(layer.weight).clone() for layer in layers(model)]
    result = trainer.train()
    moved = [not torch.equal(full(layer.weight), weight) for layer, weight in zip(layers(model), before, strict=True)]
    return (
        result.global_step,
        callback.sampler.step,
        all(moved),
        {is_distributed(layer.target) for layer in layers(model)},
    )


def every_case(rank, folder):
    return {
        "whole": accelerated(rank, efficient=False),
        "efficient": accelerated(rank, efficient=True),
        "Trainer": trained(rank, folder, sampler_first=False),
        "callback": trained(rank, folder, sampler_first=True),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = on_each_rank(functools.partial(every_case, folder=str(folder)), folder)
    return lambda name: [rank[name] for rank in ranks]


@pytest.mark.parametrize("name", ["whole", "efficient"])
def test_accelerate(found, name):
    for losses_equal, weights_equal, sharded in found(name):
        assert losses_equal == [True] * 3
        assert weights_equal
        assert all(sharded)


@pytest.mark.parametrize("name", ["Trainer", "callback"])
def test_trainer(found, name):
    assert found(name) == [(3, 3, True, {True})] * RANKS
