"""Squares of each example's gradient of a matrix, ``G_n = sum_t left[n, t] (x) right[n, t]``, summed over examples.

Either G_n is made in a buffer that stays in the cache, and squared into the sum; or, where only its norm is wanted and
that is cheaper, the norm is taken without making it (a ghost norm):

    |G_n|^2 = sum_{t, t'} (left_t . left_t') (right_t . right_t')         2 T^2 (rows + columns) operations
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of G_n are made in blocks of so many elements: the block and its part of the sum (512 KiB each in float32) stay
# in a core's L2 cache from one example to the next.
_BLOCK = 1 << 17


class Use(NamedTuple):
    """One use of a matrix: example n's gradient is ``sum_t left[n, t] (x) right[n, t]``."""

    left: Tensor  # [n, T, rows], or int64 [n, T]: each a row of the identity
    right: Tensor  # [n, T, columns]


def add_squares(total: Tensor, uses: Sequence[Use]) -> None:
    """``total += sum_n G_n^2``, elementwise."""
    rows, columns = total.shape
    tokens = [use for use in uses if not use.left.is_floating_point()]
    n, positions = uses[0].right.shape[:2]
    if len(tokens) == len(uses):
        _add_squares_of_tokens(
            total, torch.cat([use.left for use in uses], 1), torch.cat([use.right for use in uses], 1)
        )
    elif len(uses) == positions == 1:  # G_n has rank one, and so has its square
        total.addmm_(uses[0].left[:, 0].square().t(), uses[0].right[:, 0].square())
    else:
        # Rows of tokens are anywhere: such a matrix is made whole.
        step = rows if tokens or total.device.type != "cpu" else max(1, _BLOCK // columns)
        buffer = torch.empty(min(step, rows), columns, dtype=total.dtype, device=total.device)
        for begin in range(0, rows, step):
            block = total[begin : begin + step]
            for example in range(n):
                made = _gradient(uses, example, slice(begin, begin + step), buffer[: len(block)])
                block.addcmul_(made, made)


def _gradient(uses: Sequence[Use], example: int, rows: slice, buffer: Tensor) -> Tensor:
    """Those rows of G_n, written into ``buffer``."""
    dense = [use for use in uses if use.left.is_floating_point()]
    for number, (left, right) in enumerate(dense):
        torch.addmm(buffer, left[example, :, rows].t(), right[example], beta=int(number > 0), out=buffer)
    if not dense:
        buffer.zero_()
    for left, right in uses:
        if not left.is_floating_point():
            buffer.index_add_(0, left[example], right[example])
    return buffer


def _add_squares_of_tokens(total: Tensor, tokens: Tensor, gradients: Tensor) -> None:
    """As above, by the rows that each example has: those of one token in one example are one row of G_n."""
    rows = total.shape[0]
    of_example = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * rows
    pairs, place = torch.unique(tokens + of_example, return_inverse=True)
    sums = gradients.new_zeros(len(pairs), total.shape[1])
    sums.index_add_(0, place.flatten(), gradients.flatten(0, 1))
    total.index_add_(0, pairs % rows, sums.square_())


def sum_of_norms(uses: Sequence[Use], rows: int, columns: int) -> Tensor:
    """``sum_n |G_n|^2``, in the cheaper of the two ways."""
    positions = sum(use.right.shape[1] for use in uses)
    sparse = not any(use.left.is_floating_point() for use in uses)
    if sparse or positions * (rows + columns) < rows * columns:
        norm = uses[0].right.new_zeros(())
        for a, b in itertools.combinations_with_replacement(uses, 2):
            norm += (1 if a is b else 2) * (_products(a.left, b.left) * _products(a.right, b.right)).sum()
        return norm
    norm, buffer = uses[0].right.new_zeros(()), uses[0].right.new_empty(rows, columns)
    for example in range(len(uses[0].right)):
        made = _gradient(uses, example, slice(None), buffer).view(-1)
        norm += torch.dot(made, made)
    return norm


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products ``[n, Ta, Tb]`` of positions of an example."""
    if a.is_floating_point() and b.is_floating_point():
        return torch.bmm(a, b.transpose(1, 2))
    if a.is_floating_point():
        return a.gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1))
    if b.is_floating_point():
        return _products(b, a).transpose(1, 2)
    return a.unsqueeze(2) == b.unsqueeze(1)
