"""torch's FlopCounterMode sees the products of a mixed layer."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mixout_kernels as mk

ROWS, IN, OUT = 10, 64, 32
DENSE = 2 * ROWS * IN * OUT


def counted(module, x, *, backward=True):
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def mixed(p, **options):
    return mk.MixLinear.from_linear(nn.Linear(IN, OUT), p=p, **options)


@pytest.mark.parametrize("leading", [(ROWS,), (2, ROWS // 2)], ids=str)
def test_forward_counts_as_linear(leading):
    x = torch.randn(*leading, IN)
    assert counted(mixed(0.5), x, backward=False) == DENSE == counted(nn.Linear(IN, OUT), x, backward=False)


def test_backward_counts_the_kept_columns():
    """y, dx, and dw over x[:, kept] alone. The second counter copied a registry that has the formulas already."""
    for _ in range(2):
        layer, x = mixed(0.5), torch.randn(ROWS, IN, requires_grad=True)
        torch.manual_seed(5)
        total = counted(layer, x)
        kept = int(layer.weight.grad.any(dim=0).sum())
        assert 0 < kept < IN
        assert total == 2 * DENSE + 2 * ROWS * OUT * kept


def test_what_needs_no_gradient_is_not_counted():
    layer = mixed(0.5, mask="weight")
    assert counted(layer, torch.randn(ROWS, IN)) == 2 * DENSE  # y and dw
    layer.weight.requires_grad_(False)
    assert counted(layer, torch.randn(ROWS, IN, requires_grad=True)) == 2 * DENSE  # y and dx
