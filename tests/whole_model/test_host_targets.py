"""Targets in host memory: the bits of targets on the device, whatever the pieces that they come in."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels.sampler import host_memory

from .. import axes
from . import models
from .transformers_models import MODELS, inputs, make


def train(model, x, tracked=True, **options):
    """Three steps of a copy, with a moving target or without: all that a sampler's layers give."""
    model = copy.deepcopy(model)
    mk.MixSampler(model, seed=3, premix=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mk.decay_to_target(optimizer, model, 0.1)
    if tracked:
        mk.track_targets(optimizer, model, 0.9)
    results = []
    for _ in range(3):
        results.append(models.run(model, x))
        optimizer.step()
    return results


@pytest.mark.parametrize("name", MODELS)
@axes.masks
@pytest.mark.parametrize("piece_bytes", [1, 3000, 2**26])
def test_the_same_bits(name, mask, piece_bytes, device, monkeypatch):
    monkeypatch.setattr(host_memory, "PIECE_BYTES", piece_bytes)
    model = models.with_mixout(make(name), mask=mask, device=device)
    x = inputs(name).to(device)
    for host, beside in zip(train(model, x, host_targets=True), train(model, x), strict=True):
        host.assert_same_bits(beside)


def test_bfloat16_targets_and_a_layer_that_is_not_premixed(device):
    model = models.with_mixout(models.attention_net(), target_dtype=torch.bfloat16, device=device)
    model[2].p = 1.0
    x = models.random_input().to(device)
    for host, beside in zip(train(model, x, host_targets=True), train(model, x), strict=True):
        host.assert_same_bits(beside)


def test_pieces():
    def of(*numbers):
        found = host_memory.pieces([None if n is None else torch.empty(n, dtype=torch.uint8) for n in numbers])
        return [(cut.start, cut.stop) for cut in found]

    limit = host_memory.PIECE_BYTES
    assert of(5) == [(0, 1)]
    assert of(5, None, 7) == [(0, 3)]
    assert of(limit, 1, limit - 512, 1) == [(0, 1), (1, 3), (3, 4)]
    assert of(2 * limit, 2 * limit) == [(0, 1), (1, 2)]


def test_copies_keep_their_strides_and_do_not_overlap():
    targets = [torch.randn(5, 7), None, torch.randn(7, 5).t(), torch.randn(3).bfloat16()]
    (copies,) = host_memory.on_device([targets], torch.device("cpu"))
    for target, copied in zip(targets, copies, strict=True):
        assert (target is None) == (copied is None)
        if target is not None:
            assert copied.data_ptr() % 16 == 0
            assert (copied.dtype, copied.stride()) == (target.dtype, target.stride())
            assert torch.equal(copied, target)


def test_targets_on_the_host_are_not_moved_with_the_model():
    model = models.with_mixout(models.mlp())
    model[2].weight, model[2].target = model[0].weight, model[0].target  # tied
    before = [model[0].target, model[2].target]
    sampler = mk.MixSampler(model, host_targets=True)
    assert model[0].target is model[2].target
    model.to("meta")
    assert model[0].target.device.type == "cpu"
    model.to_empty(device="cpu")
    sampler.remove()
    assert model[0].target is model[2].target
    assert torch.equal(model[0].target, before[0])
    assert "0.target" not in model.state_dict()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_copy_is_a_model_without_a_sampler(name, copied):
    model, x = models.with_mixout(make(name)), inputs(name)
    mk.MixSampler(model, host_targets=True)
    other = copied(model)
    for layer, original in zip(models.mixed_layers(other).values(), models.mixed_layers(model).values(), strict=True):
        assert torch.equal(layer.target, original.target)
    models.run(other, x)
    mk.MixSampler(other, host_targets=True)
    models.run(other, x)
    mk.remove_mixout(other)
    other.to("meta")
    assert torch.equal(copied(model).eval()(x), model.eval()(x))
    mk.remove_mixout(model)
    assert not any(hasattr(module, "target") for module in model.modules())


def test_targets_that_are_not_dense():
    model = models.with_mixout(models.mlp())
    model[0].target = torch.randn(models.HIDDEN, 2 * models.IN)[:, : models.IN]
    model[2].target = torch.zeros(1, 1).expand(models.OUT, models.HIDDEN)
    x = models.random_input()
    for host, beside in zip(
        train(model, x, tracked=False, host_targets=True), train(model, x, tracked=False), strict=True
    ):
        host.assert_same_bits(beside)


def test_decay_has_one_target_of_the_host_on_the_device_at_a_time(monkeypatch):
    """Not in CPU memory, where .to makes no copies: by dtype, which makes them too."""
    model = models.with_mixout(models.attention_net(), target_dtype=torch.bfloat16)
    mk.MixSampler(model, host_targets=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mk.decay_to_target(optimizer, model, 0.1)
    models.run(model, models.random_input())
    alive = weakref.WeakSet()
    most = []
    to = torch.Tensor.to

    def counted(tensor, *arguments, **options):
        result = to(tensor, *arguments, **options)
        if result.dim() == 2 and tensor.dtype == torch.bfloat16:
            alive.add(result)
            most.append(len(alive))
        return result

    monkeypatch.setattr(torch.Tensor, "to", counted)
    optimizer.step()
    assert len(most) == 5
    assert max(most) <= 2  # the last one's name, and the next one


def test_without_premix_there_is_nothing_to_copy_for():
    model = models.with_mixout(models.mlp())
    with pytest.raises(ValueError, match=r"^MixSampler: host_targets: expected False with premix=False"):
        mk.MixSampler(model, host_targets=True, premix=False)
    assert not model[0].host_target


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: memory of the GPU")
def test_the_gpu_holds_two_pieces_at_most(monkeypatch):
    weight_bytes = 4 * 512 * 512
    monkeypatch.setattr(host_memory, "PIECE_BYTES", weight_bytes)
    model = models.with_mixout(nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))), device="cuda")
    sampler = mk.MixSampler(model, host_targets=True)
    assert all(layer.target.is_pinned() for layer in models.mixed_layers(model).values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 512, device="cuda")
    for _ in range(2):
        models.step(model, optimizer, x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampler.mix(sampler._slots)
    assert torch.cuda.max_memory_allocated() - before < 3 * weight_bytes
