"""What apply_mixout must leave as it was around a swapped module: shared Parameters, shared modules, hooks."""

import copy

import torch
from torch import nn

import mixout_kernels as mk


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.second(self.first(self.embedding(tokens))))


def test_tied_parameters_stay_tied_and_share_one_target():
    model = Tied()
    report = mk.apply_mixout(model, p=0.5)
    assert model.first.weight is model.second.weight
    assert model.first.target is model.second.target
    assert model.decoder.weight is model.embedding.weight
    assert report.target_bytes == 2 * 8 * 8 * 4
    model(torch.randint(8, (3,))).sum().backward()
    mk.remove_mixout(model)
    assert model.first.weight is model.second.weight
    assert model.decoder.weight is model.embedding.weight


def test_a_module_in_several_places_is_swapped_once():
    """As ALBERT's layers: one module, several names; it stays one module, there and back."""
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(nn.ReLU(), shared), "c": shared})
    report = mk.apply_mixout(model, p=0.5)
    assert set(report.mixed) == {"a.0", "b.1", "c"}
    assert report.target_bytes == 8 * 8 * 4
    assert isinstance(model["c"], mk.MixLinear)
    assert model["a"][0] is model["b"][1] is model["c"]
    assert model["c"].weight is shared.weight
    mk.remove_mixout(model)
    assert type(model["c"]) is nn.Linear
    assert model["a"][0] is model["b"][1] is model["c"]


def test_each_call_of_a_shared_module_draws_its_own_mask():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer)
    mk.apply_mixout(model, p=0.5)
    model[0].target.zero_()
    x = torch.eye(64)
    assert not torch.equal(model(x), model(x))


def test_deepcopy_of_a_model_keeps_its_ties():
    model = Tied()
    mk.apply_mixout(model, p=0.5)
    other = copy.deepcopy(model)
    assert other.first.weight is other.second.weight
    assert other.first.target is other.second.target
    assert other.first.weight is not model.first.weight
    mk.remove_mixout(other)
    assert isinstance(model.first, mk.MixLinear)
    assert type(other.first) is nn.Linear


def hooked():
    calls = []
    model = nn.Sequential(nn.Linear(4, 4))
    handles = [
        model[0].register_forward_pre_hook(lambda *_: calls.append("pre")),
        model[0].register_forward_hook(lambda *_: calls.append("forward")),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
        model[0].register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]
    return model, calls, handles


def exercise(model):
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    model.state_dict()


def test_hooks_stay_there_and_back():
    model, calls, _ = hooked()
    for change in (lambda m: mk.apply_mixout(m, p=0.5), mk.remove_mixout):
        change(model)
        calls.clear()
        exercise(model)
        assert calls == ["pre", "forward", "backward", "state"]


def test_hooks_from_before_can_be_removed_after():
    """What register_forward_hook returned must still take the hook away: adapters and profilers do."""
    model, calls, handles = hooked()
    mk.apply_mixout(model, p=0.5)
    for handle in handles:
        handle.remove()
    exercise(model)
    assert calls == []


def test_parameter_hooks_and_optimizer_still_fit():
    model, _, _ = hooked()
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mk.apply_mixout(model, p=0.1)  # of 4 columns: with p = 0.5 one draw in 16 keeps none
    before = model[0].weight.clone()
    exercise(model)
    optimizer.step()
    assert seen == [(4, 4)]
    assert not torch.equal(model[0].weight, before)
