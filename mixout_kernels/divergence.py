"""The symmetric Kullback-Leibler divergence of two sets of logits, with its backward in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the logits that are worked on at once: the intermediate results of a block stay in the cache.
_BLOCK = 1 << 17


def symmetric_kl(a: Tensor, b: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    r"""The mean over rows of KL(p_a || p_b) + KL(p_b || p_a), where p = softmax(logits).

    .. code-block:: text

        KL + KL = sum (p_a - p_b) (log p_a - log p_b)        L = log p_a - log p_b
        d / da  = [p_a (L - <p_a, L>) + p_a - p_b] / rows
        d / db  = [p_b (<p_b, L> - L) + p_b - p_a] / rows

    Computed in float32 (float64 for float64 logits). Backward is in closed form: saved are the logits and four numbers
    a row, no probabilities.

    Args:
        a, b: logits ``[..., classes]``.
        ignore: bool ``[...]``: rows to leave out of the mean.

    Returns:
        A scalar; 0 if every row is ignored.

    Raises:
        TypeError, ValueError: for tensors that do not fit each other.
    """
    for name, logits in (("a", a), ("b", b)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"symmetric_kl: {name}: expected a floating-point tensor of logits, got {found}")
    if a.dim() == 0 or a.shape != b.shape:
        raise ValueError(
            f"symmetric_kl: b: expected the shape of a, [..., classes], got {list(b.shape)} and {list(a.shape)}"
        )
    if ignore is not None and (ignore.dtype != torch.bool or ignore.shape != a.shape[:-1]):
        raise ValueError(
            f"symmetric_kl: ignore: expected bool {list(a.shape[:-1])}, got {ignore.dtype} {list(ignore.shape)}"
        )
    classes = a.shape[-1]
    return _SymmetricKL.apply(
        a.reshape(-1, classes), b.reshape(-1, classes), None if ignore is None else ignore.flatten()
    )


class _SymmetricKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ignore: Tensor | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        # By row: log sum exp a, log sum exp b, <p_a, L>, <p_b, L>.
        numbers = torch.empty(4, len(a), dtype=dtype, device=a.device)
        for rows in _blocks(a):
            (p_a, p_b, difference), (of_a, of_b) = _distributions(a[rows], b[rows], dtype)
            numbers[0, rows], numbers[1, rows] = of_a, of_b
            numbers[2, rows], numbers[3, rows] = _inner(p_a, difference), _inner(p_b, difference)
        values = numbers[2] - numbers[3]
        if ignore is not None:
            values = values.masked_fill(ignore, 0)
        count = torch.tensor(len(a), device=a.device) if ignore is None else (~ignore).sum()
        ctx.save_for_backward(a, b, numbers, ignore, count.clamp(min=1))
        return values.sum() / count.clamp(min=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, numbers, ignore, count = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        of_row = gradient / count
        grad_a = torch.empty_like(a) if needs_a else None
        grad_b = torch.empty_like(b) if needs_b else None
        for rows in _blocks(a):
            lse_a, lse_b, mean_a, mean_b = (n.unsqueeze(1) for n in numbers[:, rows])
            (p_a, p_b, difference), _ = _distributions(a[rows], b[rows], numbers.dtype, (lse_a, lse_b))
            apart = p_a - p_b
            if grad_a is not None:
                grad_a[rows] = (_product(p_a, difference - mean_a) + apart) * of_row
            if grad_b is not None:
                grad_b[rows] = (_product(p_b, mean_b - difference) - apart) * of_row
        if ignore is not None:
            for made in (grad_a, grad_b):
                if made is not None:
                    made.masked_fill_(ignore.unsqueeze(1), 0)
        return grad_a, grad_b, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = len(logits) if logits.device.type != "cpu" else max(1, _BLOCK // max(1, logits.shape[1]))
    return (slice(begin, begin + rows) for begin in range(0, len(logits), max(1, rows)))


def _distributions(
    a: Tensor, b: Tensor, dtype: torch.dtype, normalisers: tuple[Tensor, Tensor] | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """p_a, p_b and L of some rows, and the logarithms of their normalisers."""
    a, b = a.to(dtype), b.to(dtype)
    of_a, of_b = normalisers or (a.logsumexp(1, keepdim=True), b.logsumexp(1, keepdim=True))
    log_a, log_b = a - of_a, b - of_b
    # A class that is masked by -inf in both has no difference; infinities subtracted would be NaN.
    difference = torch.where(log_a == log_b, 0, log_a - log_b)
    return (log_a.exp_(), log_b.exp_(), difference), (of_a.squeeze(1), of_b.squeeze(1))


def _product(p: Tensor, difference: Tensor) -> Tensor:
    """0 where p is, also if the difference is infinite."""
    return torch.where(p == 0, 0, p * difference)


def _inner(p: Tensor, difference: Tensor) -> Tensor:
    return _product(p, difference).sum(1)
