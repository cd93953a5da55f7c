"""``mk.mixout`` on Parameters other than a Linear's weight: the neuron axis is axis 1, the input, in all of them."""

import torch
import torch.nn.functional as F
from torch import nn

import mixout_kernels as mk

from . import axes
from .memory import keep_of

SEED, P = 5, 0.5


def mixed_call(module, name, target, *inputs, mask="neuron"):
    """The module with one of its Parameters mixed, as the documentation shows it."""
    phi = mk.mixout(module.get_parameter(name), target, p=P, mask=mask, seed=SEED)
    return torch.func.functional_call(module, {name: phi}, inputs)


def test_conv2d_drops_input_channels(device):
    conv = nn.Conv2d(6, 4, 3, device=device)
    x = torch.randn(2, 6, 8, 8, device=device)
    keep = mk.keep_mask(SEED, p=P, shape=conv.weight.shape).to(device)
    assert 0 < keep.sum() < 6
    y = mixed_call(conv, "weight", None, x)
    torch.testing.assert_close(y, conv(x * keep.view(6, 1, 1) / (1 - P)), atol=1e-5, rtol=1e-4)
    y.sum().backward()
    touched = conv.weight.grad.abs().sum((0, 2, 3)).ne(0)
    assert torch.equal(touched, keep)


def test_embedding_drops_embedding_dimensions(device):
    embedding = nn.Embedding(10, 8, device=device)
    target = embedding.weight.detach().clone()
    with torch.no_grad():
        embedding.weight.add_(1)
    tokens = torch.tensor([1, 3, 3], device=device)
    keep = mk.keep_mask(SEED, p=P, shape=embedding.weight.shape).to(device)
    y = mixed_call(embedding, "weight", target, tokens)
    expected = torch.where(keep, target[tokens] + (embedding.weight[tokens] - target[tokens]) / (1 - P), target[tokens])
    torch.testing.assert_close(y, expected)


@axes.masks
def test_attention_in_proj_weight(device, mask):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, device=device)
    x = torch.randn(2, 3, 8, device=device)
    target = torch.zeros_like(attention.in_proj_weight)
    y, _ = mixed_call(attention, "in_proj_weight", target, x, x, x, mask=mask)
    with torch.no_grad():
        keep = keep_of(attention.in_proj_weight, P, mask, SEED)
        attention.in_proj_weight.copy_(torch.where(keep, attention.in_proj_weight / (1 - P), 0))
    torch.testing.assert_close(y, attention(x, x, x)[0])


def test_a_vector_is_decided_element_by_element(device):
    scale = nn.LayerNorm(64, device=device)
    x = torch.randn(3, 64, device=device)
    keep = mk.keep_mask(SEED, p=P, shape=(64,)).to(device)
    y = mixed_call(scale, "weight", None, x)
    torch.testing.assert_close(y, torch.where(keep, F.layer_norm(x, (64,)) * 2, 0.0))
