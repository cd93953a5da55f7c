"""Mixout in plain PyTorch: the oracle, the fallback and the documentation of this package.

    Phi = u + M_p * (w - u) / (1 - p)                the mixed weight, E Phi = w
    y   = x Phi^T + b
    dw  = scale * M_q * (g^T x)                      the true derivative for q = p and scale = 1 / (1 - p)

w is the trainable weight, u the frozen target (the pretrained weight; zero when ``target`` is None), p the mix
probability and M_p a Bernoulli(1 - p) mask. Lee, Cho & Kang, "Mixout: Effective Regularization to Finetune Large-scale
Pretrained Language Models", ICLR 2020: Phi is eq. 4, the neuron mask eq. 8. With ``grad_p`` an entry that the mix kept
has no gradient with that probability (GradDrop): q = 1 - (1 - p)(1 - grad_p), from the same word as the mix.

The functions have the signatures of their namesakes in :mod:`mixout_kernels.functional`, run on any device and
dtype, are differentiated by autograd alone, and are written to be read: nothing here is fused, masks and temporaries
of the weight's size are kept for backward. They expect valid arguments; ``checks`` is where arguments are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draw, GradientMask, scale_of, strides_of, threshold_of

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


def decisions(draw: Draw, shape: Sequence[int]) -> Tensor:
    """True where an entry is kept: a bool tensor that broadcasts to ``shape``, of size 1 where a decision is shared."""
    device = draw.seed.device
    index = torch.full([1] * len(shape), draw.offset, device=device)
    for d, (size, stride) in enumerate(zip(shape, draw.strides, strict=True)):
        if stride:
            along = torch.arange(size, device=device) * stride
            index = index + along.reshape([-1 if other == d else 1 for other in range(len(shape))])
    return keep_words(draw.seed, index) >= threshold_of(draw.p)


def keep_mask(
    seed: int | Tensor, *, p: float, shape: Sequence[int], mask: str = "neuron", axis: int | None = None
) -> Tensor:
    """True where the trainable weight is kept; dimensions along which a decision is shared are left out."""
    strides = strides_of(mask, shape, axis)
    keep = decisions(Draw(torch.as_tensor(seed, dtype=torch.int64), p, strides), shape)
    return keep.reshape([size for size, stride in zip(shape, strides, strict=True) if stride])


def mixout(
    weight: Tensor,
    target: Tensor | None,
    *,
    p: float,
    grad_p: float = 0.0,
    rescale: bool = True,
    mask: str = "neuron",
    axis: int | None = None,
    training: bool = True,
    seed: int | Tensor,
    paper_gradient: bool = False,
) -> Tensor:
    """``Phi = u + M * (w - u) / (1 - p)`` (paper, eq. 4), in ``weight``'s dtype; ``weight`` itself in eval mode.

    Half-precision weights are mixed in float32 and rounded once. ``paper_gradient=True`` gives w the gradient
    ``M * dPhi`` of the authors' code (paper, eq. 2) in place of the true ``M / (1 - p) * dPhi``.
    """
    if not training or (p == 0 and grad_p == 0):
        return weight
    seed = torch.as_tensor(seed, dtype=torch.int64, device=weight.device)
    draw = Draw(seed, p, strides_of(mask, weight.shape, axis))
    gradient = GradientMask.of(p, grad_p, rescale=rescale, paper_gradient=paper_gradient)
    return mixed_weight(weight, target, None, draw, gradient, weight.dtype)


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    p: float,
    grad_p: float = 0.0,
    rescale: bool = True,
    mask: str = "neuron",
    training: bool = True,
    seed: int | Tensor,
    paper_gradient: bool = False,
) -> Tensor:
    """``y = x Phi^T + b``: ``input`` ``[..., in]``, ``weight`` and ``target`` ``[out, in]``, ``bias`` ``[out]``."""
    if not training or (p == 0 and grad_p == 0):
        return F.linear(input, weight, bias)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=weight.device)
    draw = Draw(seed, p, strides_of(mask, weight.shape))
    gradient = GradientMask.of(p, grad_p, rescale=rescale, paper_gradient=paper_gradient)
    return F.linear(input, mixed_weight(weight, target, None, draw, gradient, input.dtype), bias)


def mixed_weight(
    weight: Tensor,
    target: Tensor | None,
    operand: Tensor | None,
    draw: Draw,
    gradient: GradientMask,
    dtype: torch.dtype,
) -> Tensor:
    """Phi in ``dtype``, or ``operand`` in its place, with ``scale * M_q * dPhi`` as w's gradient."""
    if operand is None and draw.p == 0:
        operand = weight.detach().to(dtype)
    if operand is not None:
        return _Substitute.apply(weight, operand, decisions(draw.at(gradient.q), weight.shape), gradient.scale)
    precise = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(precise)
    u = torch.zeros_like(w) if target is None else target.to(precise)
    keep = decisions(draw, weight.shape)
    if draw.p == 1:  # nothing is kept; 1 / (1 - p) does not exist
        return torch.where(keep, w, u).to(dtype)
    if gradient != GradientMask.of(draw.p):
        keep_gradient = decisions(draw.at(gradient.q), weight.shape)
        w = _Substitute.apply(w, w.detach(), keep_gradient, gradient.scale * (1 - draw.p))
    # where, not a product with the mask: a NaN or Inf in a dropped w must not reach the result. The inner where keeps
    # it out of the gradient too.
    difference = torch.where(keep, w, u) - u
    return torch.where(keep, difference * scale_of(draw.p) + u, u).to(dtype)


class _Substitute(torch.autograd.Function):
    """``operand`` in the place of ``weight``, whose derivative is ``scale`` where ``keep``, zero elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, operand: Tensor, keep: Tensor, scale: float) -> Tensor:
        return operand.view_as(operand)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        weight, operand, keep, ctx.scale = inputs
        ctx.dtype, ctx.operand_dtype = weight.dtype, operand.dtype
        ctx.save_for_backward(keep)
        ctx.save_for_forward(keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        precise = torch.promote_types(grad.dtype, torch.float32)
        return torch.where(keep, grad.to(precise) * ctx.scale, 0.0).to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, tangent * ctx.scale, 0.0).to(ctx.operand_dtype)
