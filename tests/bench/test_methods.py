from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mixout_kernels as mk
from benchmarks.common.methods import PlainMixLinear, apply_plain_mixout, plain_mixout


def keeps_and_drops(phi: Tensor, weight: Tensor, target: Tensor, p: float) -> Tensor:
    """The mask that phi was made with, after a check that every entry is one of the two it can be."""
    kept = target + (weight - target) / (1 - p)
    assert ((phi == kept) | (phi == target)).all()
    return phi == kept


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9])
def test_entries_are_kept_at_the_given_rate(p: float) -> None:
    weight, target = torch.randn(2, 300, 200, dtype=torch.float64)
    keep = keeps_and_drops(plain_mixout(weight, target, p, "weight"), weight, target, p)
    # Six standard deviations of the binomial share of 60 000 entries.
    assert abs(keep.double().mean() - (1 - p)) <= 6 * (p * (1 - p) / 60_000) ** 0.5


@pytest.mark.parametrize("axis", [0, 1])
def test_neuron_mask_is_one_decision_per_input_feature(axis: int) -> None:
    weight, target = torch.randn(2, 30, 40, dtype=torch.float64)
    keep = keeps_and_drops(plain_mixout(weight, target, 0.5, "neuron", axis), weight, target, 0.5)
    decisions = keep.movedim(axis, 0)
    assert (decisions == decisions[:, :1]).all()
    assert decisions.any()
    assert not decisions.all()


def test_gradient_is_the_formulas() -> None:
    weight, target, input, grad = torch.randn(4, 8, 8, dtype=torch.float64)
    layer = nn.Linear(8, 8, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    plain = PlainMixLinear(layer, target, p=0.75)
    torch.manual_seed(7)
    keep = keeps_and_drops(plain_mixout(weight, target, 0.75, "neuron"), weight, target, 0.75)
    torch.manual_seed(7)
    plain(input).backward(grad)
    torch.testing.assert_close(layer.weight.grad, keep * 4 * (grad.t() @ input))
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = nn.ModuleList([self.first])
        self.conv = Conv1D(5, 6)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(self.again[0](self.first(input)))))


def test_it_goes_into_the_layers_of_apply_mixout() -> None:
    ours, plain = Net(), Net()
    keys, parameters = list(plain.state_dict()), list(plain.parameters())
    report = mk.apply_mixout(ours, p=0.5)
    assert apply_plain_mixout(plain, p=0.5) == list(report.mixed)
    assert plain.first is plain.again[0]
    assert plain.dropout.p == 0
    assert list(plain.state_dict()) == keys
    assert all(now is before for now, before in zip(plain.parameters(), parameters, strict=True))


def test_eval_mode_is_the_model_without_mixout() -> None:
    net, input = Net().eval(), torch.randn(3, 6)
    expected = net(input)
    apply_plain_mixout(net, p=0.5)
    torch.testing.assert_close(net(input), expected)


def test_target_is_the_weight_from_before_training() -> None:
    net = Net()
    before = net.first.weight.detach().clone()
    apply_plain_mixout(net, p=1.0)
    with torch.no_grad():
        net.first.weight.add_(1)
    input = torch.randn(3, 6)
    assert torch.equal(net.first(input), F.linear(input, before, net.first.bias))
