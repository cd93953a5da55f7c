"""A hook writes its mask over a gradient only where nobody else can see that memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixout_kernels as mk

TOKENS = torch.tensor([[3, 0, 11], [3, 19, 4]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, use: Callable[[Net], Tensor]) -> Tensor:
        return use(self)


def _of_tokens(net: Net) -> Tensor:
    return net.norm(net.table(TOKENS)).square().sum()


def _with_tied_product(net: Net) -> Tensor:
    return (net.table(TOKENS) @ net.table.weight.t()).square().sum()


def _expected(mask: str, use: Callable[[Net], Tensor]) -> dict[str, Tensor]:
    plain = Net()
    plain(use).backward()
    seeds = _seeds(plain, mask)
    return {
        name: mk.mixout(parameter.grad, None, p=0.4, mask=mask, seed=seeds[name])  # type: ignore[arg-type]
        for name, parameter in plain.named_parameters()
        if parameter.grad is not None
    }


def _masked(net: Net, mask: str) -> mk.MixSampler:
    mk.apply_graddrop(net, p=0.4, mask=mask)  # type: ignore[arg-type]
    return mk.MixSampler(net, seed=5)


def _seeds(net: Net, mask: str) -> dict[str, Tensor]:
    from mixout_kernels.gradient_masks import gradient_masks_of

    _masked(net, mask)
    masks = gradient_masks_of(net)
    assert masks is not None
    return {hook.name: hook.seed(torch.device("cpu")) for hook in masks.hooks.values()}  # type: ignore[union-attr]


@pytest.mark.parametrize("use", [_of_tokens, _with_tied_product], ids=["tokens", "tied"])
@pytest.mark.parametrize("mask", ["neuron", "weight", "output"])
def test_mask_written_over_the_gradient_is_the_mask_of_a_copy(mask: str, use: Callable[[Net], Tensor]) -> None:
    net = Net()
    sampler = _masked(net, mask)
    net(use).backward()
    expected = _expected(mask, use)
    assert any((gradient != 0).any() and (gradient == 0).any() for gradient in expected.values())
    for name, parameter in net.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name  # type: ignore[arg-type]
    sampler.remove()


@pytest.mark.skipif(not hasattr(Tensor, "_use_count"), reason="this torch does not tell who holds a tensor")
def test_memory_of_the_gradient_is_reused() -> None:
    net = Net()
    before: list[int] = []
    net.table.weight.register_hook(lambda gradient: before.append(gradient.data_ptr()))  # before graddrop's own
    sampler = _masked(net, "neuron")
    net(_of_tokens).backward()
    assert net.table.weight.grad is not None
    assert [net.table.weight.grad.data_ptr()] == before
    sampler.remove()


@pytest.mark.parametrize("keep", [lambda g: g, Tensor.detach, Tensor.numpy, lambda g: g[1:]], ids=range(4))
def test_gradient_that_an_earlier_hook_has_kept_stays_whole(keep: Callable[[Tensor], object]) -> None:
    plain = Net()
    plain(_of_tokens).backward()
    net, kept = Net(), []
    net.table.weight.register_hook(lambda gradient: kept.append(keep(gradient)))
    sampler = _masked(net, "neuron")
    net(_of_tokens).backward()
    whole = keep(plain.table.weight.grad)  # type: ignore[arg-type]
    assert torch.equal(torch.as_tensor(kept[0]), torch.as_tensor(whole))
    assert not torch.equal(net.table.weight.grad, plain.table.weight.grad)  # type: ignore[arg-type]
    sampler.remove()


def test_gradient_of_both_terms_of_a_sum_stays_whole_for_the_other() -> None:
    net = Net()
    other = nn.Parameter(torch.zeros(40, 8))
    factor = torch.randn(40, 8)
    sampler = _masked(net, "weight")
    net(lambda net: ((net.table.weight + other) * factor).sum()).backward()
    assert torch.equal(other.grad, factor)  # type: ignore[arg-type]
    assert (net.table.weight.grad == 0).any()  # type: ignore[union-attr]
    sampler.remove()


def test_accumulation_masks_each_gradient_once() -> None:
    once, twice = Net(), Net()
    for net, times in ((once, 1), (twice, 2)):
        sampler = _masked(net, "neuron")
        for _ in range(times):
            net(_of_tokens).backward()
        sampler.remove()
    assert torch.equal(twice.table.weight.grad, 2 * once.table.weight.grad)  # type: ignore[arg-type, operator]


def test_fixed_mask_drops_what_is_not_finite() -> None:
    weight = nn.Linear(3, 2, bias=False)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    mk.apply_graddrop(weight, keep={"weight": keep})
    x = torch.tensor([[1.0, float("nan"), 2.0], [0.0, 1.0, float("inf")]])
    weight(x).backward(torch.ones(2, 2))
    whole = torch.ones(2, 2).t() @ x
    assert torch.equal(weight.weight.grad.nan_to_num(7, 8, 9), torch.where(keep, whole, 0).nan_to_num(7, 8, 9))  # type: ignore[union-attr]


def test_gradient_that_is_differentiated_again_is_not_overwritten() -> None:
    net = Net()
    seeds = _seeds(Net(), "neuron")
    sampler = _masked(net, "neuron")
    weight = net.table.weight
    (gradient,) = torch.autograd.grad(F.embedding(TOKENS, weight).pow(3).sum(), weight, create_graph=True)
    gradient.sum().backward()
    mask = mk.mixout(torch.ones(40, 8), None, p=0.4, seed=seeds["table.weight"])  # M / (1 - p)
    second = torch.zeros(40, 8).index_add_(0, TOKENS.flatten(), 6 * weight.detach()[TOKENS.flatten()])
    torch.testing.assert_close(weight.grad, mask * mask * second)
    sampler.remove()
