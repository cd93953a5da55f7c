"""Mixout in plain PyTorch: the oracle, the fallback and the documentation of this package.

    Phi = u + M * (w - u) / (1 - p)                  the mixed weight, E Phi = w
    y   = x Phi^T + b

w is the trainable weight, u the frozen target (the pretrained weight; zero when ``target`` is None), p the mix
probability and M a Bernoulli(1 - p) mask. Lee, Cho & Kang, "Mixout: Effective Regularization to Finetune Large-scale
Pretrained Language Models", ICLR 2020: Phi is eq. 4, the neuron mask eq. 8.

The functions have the signatures of their namesakes in :mod:`mixout_kernels.functional`, run on any device and
dtype, are differentiated by autograd alone, and are written to be read: nothing here is fused, masks and temporaries
of the weight's size are kept for backward. They expect valid arguments; ``functional`` is where arguments are checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

UINT32 = 0xFFFFFFFF


def philox4x32_10(seed: Tensor, counter: Tensor) -> Tensor:
    """The four 32-bit words of Philox4x32-10 for each counter, as an int64 tensor ``[n, 4]``.

    Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. ``seed`` holds the 64-bit key,
    ``counter`` ``[n]`` the low 64 bits of the counter; its high 64 bits are zero.
    """
    k0, k1 = seed.reshape(()) & UINT32, (seed.reshape(()) >> 32) & UINT32
    c0, c1 = counter & UINT32, (counter >> 32) & UINT32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        # int64 products wrap modulo 2^64, so the low word and the masked shift are the unsigned ones.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & UINT32) ^ c1 ^ k0, b & UINT32, ((a >> 32) & UINT32) ^ c3 ^ k1, a & UINT32
        k0, k1 = (k0 + 0x9E3779B9) & UINT32, (k1 + 0xBB67AE85) & UINT32
    return torch.stack([c0, c1, c2, c3], dim=1)


def keep_words(seed: Tensor, index: Tensor) -> Tensor:
    """``word(seed, i)``: lane ``i % 4`` of the Philox block with counter ``i // 4``, for an int64 tensor of indices."""
    blocks = philox4x32_10(seed, (index >> 2).reshape(-1))
    return blocks.gather(1, (index & 3).reshape(-1, 1)).reshape(index.shape)


def keep_mask(seed: int | Tensor, *, p: float, shape: Sequence[int], mask: str = "neuron") -> Tensor:
    """True where the trainable weight is kept: ``word(seed, i) >= floor(p * 2^32)``.

    ``mask="neuron"``: one decision per input feature, i = index on axis 1, shape ``[shape[1]]``.
    ``mask="weight"``: one per element, i = row-major index, shape ``shape``. For a 1-D shape both are per element.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64)
    per_feature = mask == "neuron" and len(shape) > 1
    index_shape = (shape[1],) if per_feature else tuple(shape)
    index = torch.arange(math.prod(index_shape), device=seed.device).reshape(index_shape)
    return keep_words(seed, index) >= math.floor(p * 2**32)


def mixout(
    weight: Tensor,
    target: Tensor | None,
    *,
    p: float,
    mask: str = "neuron",
    training: bool = True,
    seed: int | Tensor,
    paper_gradient: bool = False,
) -> Tensor:
    """``Phi = u + M * (w - u) / (1 - p)`` (paper, eq. 4), in ``weight``'s dtype; ``weight`` itself in eval mode.

    Half-precision weights are mixed in float32 and rounded once. ``paper_gradient=True`` gives w the gradient
    ``M * dPhi`` of the authors' code (paper, eq. 2) in place of the true ``M / (1 - p) * dPhi``.
    """
    if not training or p == 0:
        return weight
    return _mixed(weight, target, p, mask, seed, paper_gradient).to(weight.dtype)


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    p: float,
    mask: str = "neuron",
    training: bool = True,
    seed: int | Tensor,
    paper_gradient: bool = False,
) -> Tensor:
    """``y = x Phi^T + b``: ``input`` ``[..., in]``, ``weight`` and ``target`` ``[out, in]``, ``bias`` ``[out]``."""
    if not training or p == 0:
        return F.linear(input, weight, bias)
    return F.linear(input, _mixed(weight, target, p, mask, seed, paper_gradient).to(input.dtype), bias)


def _mixed(weight: Tensor, target: Tensor | None, p: float, mask: str, seed: int | Tensor, paper: bool) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(dtype)
    u = torch.zeros_like(w) if target is None else target.to(dtype)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=weight.device)
    keep = keep_mask(seed, p=p, shape=weight.shape, mask=mask)
    if mask == "neuron" and weight.dim() > 2:
        keep = keep.reshape(-1, *[1] * (weight.dim() - 2))
    if p == 1:  # nothing is kept; 1 / (1 - p) does not exist
        return torch.where(keep, w, u)
    if paper:
        w = _ScaleGradient.apply(w, 1 - p)
    # where, not a product with the mask: a NaN or Inf in a dropped w must not reach the result. The inner where keeps
    # it out of the gradient too.
    difference = torch.where(keep, w, u) - u
    return torch.where(keep, difference * (1 / (1 - p)) + u, u)


class _ScaleGradient(torch.autograd.Function):
    """Identity in forward, a constant factor in backward."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.factor, None
