"""Targets under FSDP2: where they come from, how they move and are saved, and the bytes that travel."""

import copy
import functools
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import mixout_kernels as mk
from mixout_kernels import backends, checkpoints
from mixout_kernels.pieces import is_distributed, local, own_piece
from mixout_kernels.sampler.shards import gathering

from ..whole_model import models
from ..whole_model.processes import RANKS, on_each_rank
from .sharded import Twins, all_of, error_of, full, layers, mlp, resumed_from, save

SAME = {"losses": True, "gradients": True}
UNEVEN = functools.partial(mlp, 48, 41, 9)


def targets_equal(twins):
    pairs = zip(layers(twins.alone), layers(twins.sharded), strict=True)
    return all_of(torch.equal(alone.target, full(sharded.target)) for alone, sharded in pairs)


def followed(rank, folder, **options):
    """Weights that are pulled to targets, and targets that follow weights, piece by piece."""
    twins = Twins(UNEVEN, **options)
    for model, optimizer in zip(twins.pair, twins.optimizers, strict=True):
        factor = twins.ratio if model is twins.sharded else 1  # as the learning rates differ
        mk.decay_to_target(optimizer, model, 0.25 * factor, exclude=())
        mk.track_targets(optimizer, model, 0.75)
    before = [layer.target.clone() for layer in layers(twins.alone)]
    trained = twins.train()
    moved = not any(torch.equal(layer.target, old) for layer, old in zip(layers(twins.alone), before, strict=True))
    weights = all_of(torch.equal(a, full(b)) for a, b in zip(*(m.parameters() for m in twins.pair), strict=True))
    return trained, targets_equal(twins), weights, moved


def pulled_to_whole_targets(rank, folder):
    """Each rank to its rows of them, where the sampler was made before fully_shard."""
    twins = Twins(UNEVEN, sampler_first=True)
    for model, optimizer in zip(twins.pair, twins.optimizers, strict=True):
        mk.decay_to_target(optimizer, model, 0.25 * (twins.ratio if model is twins.sharded else 1))
    return twins.train(), error_of(lambda: mk.track_targets(twins.optimizers[1], twins.sharded, 0.5))


def switched_to_shards(model, optimizer):
    """What accelerate does when it prepares both."""
    for unit in (*(m for m in model if isinstance(m, nn.Linear)), model):
        fully_shard(unit)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def pulled_as_before(wrap, rank, mixout=False, shard_targets=False):
    """Whether a model that was wrapped after the hook was made is pulled as one that is whole."""
    alone = UNEVEN()
    if mixout:
        mk.apply_mixout(alone, p=0.5, target_dtype=torch.bfloat16)
    pair = alone, copy.deepcopy(alone)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in pair]
    for model, optimizer in zip(pair, optimizers, strict=True):
        mk.decay_to_target(optimizer, model, 0.3)
    wrap(pair[1], optimizers[1])
    if shard_targets:
        mk.shard_targets(pair[1])
    for _ in range(2):
        for model, optimizer in zip(pair, optimizers, strict=True):
            with torch.no_grad():
                for parameter in model.parameters():
                    local(parameter).add_(1)
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    moved = all_of(
        not torch.equal(p, 2 + old) for p, old in zip(alone.parameters(), UNEVEN().parameters(), strict=True)
    )
    return moved, all_of(torch.equal(a, full(b)) for a, b in zip(*(m.parameters() for m in pair), strict=True))


def sharded_after_the_hook(rank, folder):
    found = {
        "plain": pulled_as_before(switched_to_shards, rank),
        "mixout": pulled_as_before(switched_to_shards, rank, mixout=True),
        "sharded targets": pulled_as_before(switched_to_shards, rank, mixout=True, shard_targets=True),
    }

    def in_the_model_alone(model, optimizer):
        fully_shard(model)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pulled_as_before(in_the_model_alone, rank)
    found["said"] = [str(warning.message) for warning in said if "decay_to_target" in str(warning.message)]

    def by_fsdp1(model, optimizer):
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    found["FSDP1"] = error_of(lambda: pulled_as_before(by_fsdp1, rank))
    twins = Twins(UNEVEN, sampler_first=True)
    whole = copy.deepcopy(twins.alone)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    mk.track_targets(optimizer, whole, 0.5)
    fully_shard(whole)
    found["track"] = error_of(optimizer.step)
    return found


def sharded_later(rank, folder):
    twins = Twins(UNEVEN, sampler_first=True)
    before = [is_distributed(layer.target) for layer in layers(twins.sharded)]
    mk.shard_targets(twins.sharded)
    return before, twins.train(), targets_equal(twins), twins.target_bytes()


def from_weights(rank, folder):
    """As accelerate leaves a model with cpu_ram_efficient_loading: weights everywhere, targets on the first rank."""
    model = UNEVEN()
    mk.apply_mixout(model, p=0.5)
    whole = [layer.target.clone() for layer in layers(model)]
    if rank > 0:
        for layer in layers(model):
            layer.target.zero_()
    fully_shard(model)
    refused = error_of(lambda: mk.MixSampler(model)), error_of(lambda: mk.shard_targets(model))
    mk.shard_targets(model, from_weights=True)
    mk.MixSampler(model)
    equal = [torch.equal(target, full(layer.target)) for target, layer in zip(whole, layers(model), strict=True)]
    return refused, equal


def from_meta(rank, folder):
    """A model that is nowhere whole: made on the meta device, sharded, and filled from a checkpoint."""
    with torch.device("meta"):
        model = UNEVEN()
    mk.apply_mixout(model, p=0.5, target_dtype=torch.bfloat16)
    for unit in (*layers(model), model):
        fully_shard(unit)
    model.to_empty(device="cpu")
    refused = error_of(lambda: mk.MixSampler(model))
    for parameter, source in zip(model.parameters(), UNEVEN().parameters(), strict=True):
        local(parameter).copy_(own_piece(source.detach(), parameter))
    mk.shard_targets(model, from_weights=True)
    mk.MixSampler(model, seed=3)
    twin = UNEVEN()
    mk.apply_mixout(twin, p=0.5, target_dtype=torch.bfloat16)
    mk.MixSampler(twin, seed=3)
    backends.load("cpu")._HAS_PRODUCT = False
    x = models.random_input()
    return refused, torch.equal(model.train()(x), twin.train()(x)), layers(model)[0].target.dtype


def from_files(rank, folder):
    """Of a safetensors file each rank reads its own rows; of others it keeps no more."""
    source = UNEVEN()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    if rank == 0:
        save_file(source.state_dict(), f"{folder}/targets.safetensors")
        torch.save(source.state_dict(), f"{folder}/targets.bin")
    dist.barrier()
    reads = []
    whole_read = checkpoints._Safetensors.__getitem__
    checkpoints._Safetensors.__getitem__ = lambda self, key: reads.append(key) or whole_read(self, key)
    found = []
    for targets in (f"{folder}/targets.safetensors", f"{folder}/targets.bin", source.state_dict(), source):
        model = UNEVEN()
        mk.apply_mixout(model, p=0.5)
        fully_shard(model)
        mk.shard_targets(model, targets=targets)
        mk.MixSampler(model)
        pairs = zip(source[::2], layers(model), strict=True)
        found.append(all_of(torch.equal(plain.weight, full(layer.target)) for plain, layer in pairs))
    checkpoints._Safetensors.__getitem__ = whole_read
    missing = {"0.weight": source[0].weight.detach()}
    refused = error_of(lambda: mk.shard_targets(model, targets=missing))
    return found, reads, refused


def saved_and_resumed(rank, folder):
    """By torch.distributed.checkpoint, with the names of the plain model."""
    twins = Twins(models.attention_net, p=0.7)
    twins.optimize(torch.optim.AdamW)
    twins.train(steps=2)
    names = list(twins.sharded.state_dict()) == list(models.attention_net().state_dict())
    model, _ = get_state_dict(twins.sharded, twins.optimizers[1])
    torch.save(model, file := io.BytesIO())
    save(twins, folder)
    resumed = resumed_from(folder, twins)
    model, _ = get_state_dict(resumed.sharded, resumed.optimizers[1])
    loads = torch.load(io.BytesIO(file.getvalue()), weights_only=True).keys() == model.keys()
    return names, loads, resumed.train(steps=2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 12)
        self.hidden = nn.Linear(12, 12)
        self.decoder = nn.Linear(12, 16, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.hidden(self.embedding(x[:, :4].abs().mul(4).long() % 16))))


def tied(rank, folder):
    """The embedding reads the weight itself: the target of a weight that it shares stays whole."""
    twins = Twins(Tied, units=lambda model: [])
    found = [is_distributed(twins.sharded.get_submodule(name).target) for name in ("hidden", "decoder")]
    return twins.train(), found


def without_targets(model):
    for layer in layers(model):
        layer.target = None


def masked(then, rank, folder):
    """Gradients with masks of their own, or of weights that are gathered as they are, are reduced by columns too."""
    twins = Twins(p=0.5, then=then)
    trained = twins.train()
    comms = twins.samplers[1].shards.comms
    return trained, all(comm.sent_bytes < comm.whole_bytes for comm in comms)


class Unused(nn.Module):
    """One of two layers that are gathered together has no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(48, 8), nn.Linear(48, 8)

    def forward(self, x):
        return self.used(x)


def without_a_gradient(rank, folder):
    twins = Twins(Unused, p=0.7, units=lambda model: [])
    return twins.train(), [comm.sent_bytes == comm.whole_bytes > 0 for comm in twins.samplers[1].shards.comms]


def of_a_fixed_number(rank, folder):
    """As on a GPU, where some of the columns that travel are not kept."""
    own = gathering.kept_indices
    gathering.kept_indices = lambda draw, size, fixed_number: own(draw, size, fixed_number=True)
    found = []
    for options in ({}, {"sampler": {"kept_all_gather": True}}):
        twins = Twins(functools.partial(mlp, 512, 256, 8), p=0.9, **options)
        found.append(twins.train())
        comms = twins.samplers[1].shards.comms
        found.append(0.15 < sum(comm.sent_bytes for comm in comms) / sum(comm.whole_bytes for comm in comms) < 0.25)
    gathering.kept_indices = own
    return found


def out_of_step(rank, folder):
    """One rank's sampler counts a step more."""
    twins = Twins()
    trained = twins.train(steps=1)
    if rank == 1:
        twins.samplers[1].advance()
    return trained, error_of(lambda: twins.loss(twins.sharded.train()).backward())


def bytes_sent(rank, folder):
    """The part of the weights' gradients that is reduced, and of the weights that is gathered."""
    found = {}
    kinds = {"even": {}, "uneven": {"build": UNEVEN}, "gathered": {"sampler": {"kept_all_gather": True}}}
    for name, options in kinds.items():
        twins = Twins(p=0.7, **options)
        trained = twins.train(steps=4)
        shards = twins.samplers[1].shards
        gathered = [layer for unit in shards.units for layer in unit.layers]
        rows = sum(layer.fsdp_param.padded_sharded_param_size.numel() * 4 for layer in gathered)
        reduced = [sum(getattr(comm, key) for comm in shards.comms) for key in ("sent_bytes", "whole_bytes")]
        # Each of them was gathered twice in each step, for forward and for backward; the root holds none.
        found[name] = trained, reduced[0] / reduced[1], sum(layer.sent_bytes for layer in gathered) / rows / 8
    return found


def refused(rank, folder):
    found = {}
    found["own masks"] = error_of(lambda: Twins(sampler={"same_on_all_ranks": False}))
    plain = models.with_mixout(models.mlp())
    found["plain"] = error_of(lambda: mk.shard_targets(plain))
    found["both"] = error_of(lambda: mk.shard_targets(plain, from_weights=True, targets={}))
    sharded = models.with_mixout(models.mlp())
    fully_shard(sharded)
    other = models.mlp()
    mk.apply_mixout(other, p=0.5, include=("0",) if rank == 0 else ("0", "2"))
    fully_shard(other)
    found["layers"] = error_of(lambda: mk.MixSampler(other))
    found["group"] = error_of(lambda: mk.MixSampler(sharded, process_group=ALONE[rank]))
    mk.shard_targets(sharded)
    found["no sampler"] = error_of(lambda: sharded(torch.ones(2, 48)))
    found["own masks, sharded"] = error_of(lambda: mk.MixSampler(sharded, same_on_all_ranks=False))
    found["no slot"] = all(layer.slot is None for layer in layers(sharded))
    hooked = models.mlp()
    mk.apply_graddrop(hooked, p=0.5)  # biases too
    fully_shard(hooked)
    found["hooks"] = error_of(lambda: hooked(torch.ones(2, 48)))
    return found


ALONE = []
CASES = {
    "with graddrop": functools.partial(masked, lambda model: mk.apply_graddrop(model, p=0.5, exclude=("bias",))),
    "without targets": functools.partial(masked, without_targets),
    "without a gradient": without_a_gradient,
    "fixed number": of_a_fixed_number,
    "followed": followed,
    "pulled": pulled_to_whole_targets,
    "sharded after": sharded_after_the_hook,
    "sharded later": sharded_later,
    "from weights": from_weights,
    "from meta": from_meta,
    "from files": from_files,
    "resumed": saved_and_resumed,
    "tied": tied,
    "bytes": bytes_sent,
    "refused": refused,
    "out of step": out_of_step,
}


def every_case(rank, folder):
    ALONE.extend(dist.new_group([other]) for other in range(RANKS))
    return {name: case(rank, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = on_each_rank(functools.partial(every_case, folder=str(folder)), folder)
    return lambda name: [rank[name] for rank in ranks]


def test_weights_are_pulled_and_targets_follow_on_each_rank(found):
    assert found("followed") == [(SAME, True, True, True)] * RANKS


def test_weights_are_pulled_to_whole_targets_too(found):
    for trained, message in found("pulled"):
        assert trained == SAME
        assert message.startswith(
            "TypeError: track_targets: model: expected a weight and a target that are both whole,"
        )


def test_a_model_that_is_sharded_after_the_hook_was_made(found):
    for of_rank in found("sharded after"):
        for name in ("plain", "mixout", "sharded targets"):
            assert of_rank[name] == (True, True), name
        assert len(of_rank["said"]) == 1
        assert of_rank["said"][0].startswith("decay_to_target: the optimizer holds none of the parameters of the model")
        assert of_rank["track"].startswith(
            "TypeError: track_targets: model: expected a weight and a target that are both"
        )
    messages = [of_rank["FSDP1"] for of_rank in found("sharded after")]
    assert any(
        message.startswith("TypeError: decay_to_target: model: expected '0.weight' as") for message in messages
    ), messages


def test_a_sampler_made_before_the_model_was_sharded(found):
    first, second = found("sharded later")
    assert first[:3] == second[:3] == ([False, False], SAME, True)
    assert first[3][0] + second[3][0] == first[3][1]


def test_targets_of_the_present_weights(found):
    for messages, equal in found("from weights"):
        for message, function in zip(messages, ("MixSampler", "shard_targets"), strict=True):
            assert message.startswith(f"ValueError: {function}: model: expected the same target of '0' on every rank")
            assert "shard_targets(model, from_weights=True)" in message
        assert equal == [True, True]


def test_a_model_from_the_meta_device(found):
    for message, equal, dtype in found("from meta"):
        assert message.startswith(
            "ValueError: MixSampler: model: expected the target of '0' in memory on every rank, got"
        )
        assert equal
        assert dtype == torch.bfloat16


def test_targets_of_files(found):
    for equal, whole_reads, message in found("from files"):
        assert equal == [True] * 4
        assert whole_reads == []
        assert message == (
            "ValueError: shard_targets: targets: expected an entry for the weight of '2', got 1 others such as "
            "'0.weight'"
        )


def test_a_resumed_run_goes_on_as_one_that_was_never_interrupted(found):
    assert found("resumed") == [(True, True, SAME)] * RANKS


def test_targets_of_tied_weights_stay_whole(found):
    assert found("tied") == [(SAME, [True, False])] * RANKS


@pytest.mark.parametrize("name", ["with graddrop", "without targets"])
def test_gradients_that_are_masked_otherwise(found, name):
    assert found(name) == [(SAME, True)] * RANKS


def test_a_buffer_without_one_of_the_gradients_is_reduced_whole(found):
    assert found("without a gradient") == [(SAME, [True])] * RANKS


def test_a_fixed_number_of_columns(found):
    assert found("fixed number") == [[SAME, True, SAME, True]] * RANKS


def test_ranks_that_are_out_of_step(found):
    for trained, message in found("out of step"):
        assert trained == SAME
        assert message.startswith("RuntimeError: MixSampler: the masks of '2': expected the same on every rank, got")


def test_bytes(found):
    """A fifth more than the mean of kept columns: there are eight masks."""
    for kinds in found("bytes"):
        for name, (trained, reduced, gathered) in kinds.items():
            assert trained == SAME
            assert 0.15 < reduced < 0.45
            assert (0.15 < gathered < 0.45) if name == "gathered" else gathered == 1


def test_refusals(found):
    for messages in found("refused"):
        expected = {
            "own masks": None,
            "plain": "ValueError: shard_targets: model: expected a mixed layer with a target whose weight is a",
            "both": "ValueError: shard_targets: targets: expected None with from_weights=True, got a dict",
            "layers": "ValueError: MixSampler: model: expected '2' with the same settings on every rank, got",
            "group": "ValueError: MixSampler: process_group: expected all ranks that the weight of '0' is sharded over",
            "no sampler": "RuntimeError: MixLinear: a layer whose weight or target is a DTensor needs a MixSampler",
            "hooks": "RuntimeError: apply_graddrop: model: expected one without FSDP2 where a hook masks a gradient",
            "own masks, sharded": "ValueError: MixSampler: model: expected whole targets, and no tensor parallelism",
        }
        for name, message in expected.items():
            assert messages[name] is None if message is None else messages[name].startswith(message), messages[name]
        assert messages["no slot"]
