"""Calls that are like a layer's last one go past the checks: each thing that may be different is changed in between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mixout_kernels as mk
from mixout_kernels import planned
from mixout_kernels.sampler.snapshot import PythonSnapshot, snapshot

pytestmark = pytest.mark.skipif(mk._extension.load()[0] is None, reason="without the extension there are no plans")


def sampled_layer(premix):
    torch.manual_seed(3)
    model = nn.ModuleDict({"layer": nn.Linear(12, 8)})
    mk.apply_mixout(model, p=0.4, exclude=())
    sampler = mk.MixSampler(model, seed=5, premix=premix)
    sampler.advance()
    return model["layer"]


def plain_layer():
    torch.manual_seed(3)
    return mk.MixLinear.from_linear(nn.Linear(12, 8), p=0.4)


LAYERS = {"alone": plain_layer, "mixes": lambda: sampled_layer(False), "mixed ahead": lambda: sampled_layer(True)}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def perturb_target(layer):
    layer.target = layer.target + 1


def perturb_weight(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def perturb_target_in_place(layer):
    layer.target.sub_(1)


def replace_weight(layer):
    layer.weight = nn.Parameter(torch.randn(8, 12))


def reload_weight(layer):
    layer.weight.data = torch.randn(8, 12)


def narrow_the_target(layer):
    layer.target = layer.target.bfloat16()


def without_bias(layer):
    layer.bias = None


def freeze_weight(layer):
    layer.weight.requires_grad_(False)


CHANGES = {
    "p": lambda layer: setattr(layer, "p", 0.7),
    "p past the checks": lambda layer: layer.__dict__.update(p=0.6),
    "p is 0": lambda layer: layer.__dict__.update(p=0.0, grad_p=0.5),
    "p is 1": lambda layer: setattr(layer, "p", 1.0),
    "grad_p": lambda layer: setattr(layer, "grad_p", 0.3),
    "nothing of dw": lambda layer: setattr(layer, "grad_p", 1.0),
    "rescale": lambda layer: layer.__dict__.update(grad_p=0.3, rescale=False),
    "mask": lambda layer: setattr(layer, "mask", "weight"),
    "no target": lambda layer: setattr(layer, "target", None),
    "target": perturb_target,
    "target, in place": perturb_target_in_place,
    "target's dtype": narrow_the_target,
    "weight": replace_weight,
    "weight, in place": perturb_weight,
    "weight's memory": reload_weight,
    "dtype": lambda layer: layer.double(),
    "half": lambda layer: layer.bfloat16(),
    "bias": without_bias,
    "frozen weight": freeze_weight,
    "eval": lambda layer: layer.eval(),
    "columns": lambda layer: layer.__dict__.update(columns=torch.tensor([1, 4])),
}


def results(layer, x):
    """y and the gradients, from a generator that is set, so that layers without a sampler draw alike."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    y = layer(x)
    leaves = [t for t in (x, layer.weight, layer.bias) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def the_long_way(monkeypatch, layer, x):
    with monkeypatch.context() as patch:
        patch.setattr(planned.LastCall, "again", lambda *_: None)
        patch.setattr(mk.sampler.slot.Slot, "again", lambda *_: None)
        return results(layer, x)


def assert_same(ours, expected):
    assert [t.dtype for t in ours] == [t.dtype for t in expected]
    assert [torch.equal(a, b) for a, b in zip(ours, expected, strict=True)] == [True] * len(ours)


@layers
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_calls(monkeypatch, make, change):
    layer, x = make(), torch.randn(3, 12)
    for _ in range(2):
        results(layer, x)
    before = results(layer, x)
    change(layer)
    x = x.to(layer.weight.dtype)
    ours = results(layer, x)
    assert_same(ours, the_long_way(monkeypatch, layer, x))
    assert_same(ours, results(layer, x))
    assert len(ours) != len(before) or not all(map(torch.equal, ours, before))


@layers
def test_the_same_call_is_planned(monkeypatch, make):
    """Else everything here would be true of the long way alone."""
    layer, x = make(), torch.randn(3, 12)
    expected = the_long_way(monkeypatch, layer, x)

    def fail(*_, **__):
        raise AssertionError("a call like the last one was checked again")

    monkeypatch.setattr(mk.checks, "linear", fail)
    assert_same(results(layer, x), expected)
    assert_same(results(layer, torch.cat([x, x]))[:1], [torch.cat([expected[0], expected[0]])])  # other rows


@layers
def test_another_kernels_context(monkeypatch, make):
    layer, x = make(), torch.randn(3, 12)
    results(layer, x)
    with mk.kernels(backend="reference"):
        y = results(layer, x)[0]
        expected = the_long_way(monkeypatch, layer, x)[0]
    assert y.grad_fn.name() == expected.grad_fn.name() != "MixLinearBackward"
    with mk.kernels(schedule="staged"):
        assert_same(results(layer, x), the_long_way(monkeypatch, layer, x))
    assert results(layer, x)[0].grad_fn.name() == "MixLinearBackward"


@layers
def test_autocast_comes_and_goes(monkeypatch, make):
    layer, x = make(), torch.randn(3, 12)
    for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            ours, expected = results(layer, x), the_long_way(monkeypatch, layer, x)
        assert ours[0].dtype == (dtype or torch.float32)
        assert_same(ours, expected)


@layers
def test_no_grad_and_inference_mode(monkeypatch, make):
    layer, x = make(), torch.randn(3, 12)
    expected = results(layer, x)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                torch.manual_seed(11)
                y = layer(x)
            assert not y.requires_grad
            assert torch.equal(y, expected)
    assert_same(results(layer, x), the_long_way(monkeypatch, layer, x))


@layers
def test_transforms_and_modes_are_left_to_what_sees_them(make):
    layer, x = make(), torch.randn(3, 12)
    results(layer, x)
    params = dict(layer.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(layer, params, (x,)).sum()

    for _ in range(2):
        torch.manual_seed(11)
        dw = torch.func.grad(loss)(params, x)["weight"]
        torch.testing.assert_close(dw, results(layer, x)[2])
        torch.testing.assert_close(torch.func.vmap(layer, randomness="same")(x[None]).shape, torch.Size([1, 3, 8]))
        with torch.autograd.forward_ad.dual_level():
            dual = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0


BAD = {
    "no tensor": [1.0],
    "a proxy": torch.fx.Proxy(torch.fx.Node(torch.fx.Graph(), "x", "placeholder", "x", (), {})),
    "integers": torch.ones(3, 12, dtype=torch.int64),
    "another dtype": torch.ones(3, 12, dtype=torch.float64),
    "another width": torch.ones(3, 11),
    "a scalar": torch.tensor(1.0),
    "sparse": torch.ones(3, 12).to_sparse(),
    "another device": torch.ones(3, 12, device="meta"),
}


@layers
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_errors_are_those_of_a_first_call(make, bad):
    def message(layer):
        with pytest.raises((TypeError, ValueError, AttributeError)) as raised:
            layer(bad)
        return str(raised.value)

    expected = message(make())
    layer = make()
    results(layer, torch.randn(3, 12))
    assert message(layer) == expected


@layers
def test_nothing_of_it_is_copied_or_saved(make):
    layer, x = make(), torch.randn(3, 12)
    results(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.last_call is None
        assert other.slot is None
        assert torch.isfinite(results(other, x)[0]).all()
    mk.remove_mixout(nn.ModuleList([layer]))
    assert "last_call" not in layer.__dict__


def test_a_backend_that_cannot_is_an_error_after_one_that_can():
    layer, x = plain_layer(), torch.randn(3, 12)
    results(layer, x)
    with mk.kernels(backend="triton"), pytest.raises(RuntimeError, match="backend='triton' was asked for, but"):
        layer(x)


def test_a_batch_of_no_rows():
    layer = plain_layer()
    results(layer, torch.randn(3, 12))
    assert results(layer, torch.randn(0, 12))[0].shape == (0, 8)


SNAPSHOTS = {"in C++": snapshot, "its reference": PythonSnapshot}


@pytest.mark.parametrize("kind", SNAPSHOTS.values(), ids=SNAPSHOTS)
@pytest.mark.parametrize("target", [None, torch.zeros(4, 6)], ids=["no target", "target"])
def test_snapshots(kind, target):
    weight = nn.Parameter(torch.zeros(4, 6))
    snapshot = kind(weight, target)
    assert snapshot.is_place_of(weight, target)
    assert not snapshot.has_values_of(weight, target)  # none were noted
    snapshot.note_values(weight, target)
    assert snapshot.has_values_of(weight, target)
    assert snapshot.is_place_of(weight.detach(), target)
    for w, u in [(None, target), (weight, torch.ones(4, 6)), (torch.zeros(4, 6), target), (weight[:2], target)]:
        assert not snapshot.is_place_of(w, u)
    assert not snapshot.is_place_of(weight.detach().view(torch.int32), target)
    with torch.no_grad():
        weight.add_(1)
    assert snapshot.is_place_of(weight, target)
    assert not snapshot.has_values_of(weight, target)


@pytest.mark.parametrize("kind", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_another_storage_at_the_same_address(kind):
    memory = torch.zeros(24).numpy()
    snapshot = kind(torch.from_numpy(memory), None)
    assert not snapshot.is_place_of(torch.from_numpy(memory), None)
