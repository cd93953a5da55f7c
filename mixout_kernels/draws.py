"""Which entries of a weight are kept: the one home of the mask kinds, of thresholds and of scales.

    word(seed, i)  = lane i % 4 of Philox4x32-10(key = seed, counter = i // 4)
    index(r, c, ..) = offset + r * strides[0] + c * strides[1] + ...
    keep           = word(seed, index) >= floor(p * 2^32)                          p = 1 keeps nothing

A *kind* of mask is a rule for strides, as those of ``Tensor.expand``: a stride of 0 shares one decision along its
dimension. Everything else, on every backend, reads strides and never the name of a kind, so a new kind is one line of
``KINDS``. One word serves two thresholds: an entry is mixed where word >= floor(p * 2^32), and has a gradient where
word >= floor(q * 2^32), with q = 1 - (1 - p)(1 - grad_p). The joint law is that of two independent masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Shape = Sequence[int]
Strides = tuple[int, ...]


def _one_axis(shape: Shape, axis: int) -> Strides:
    return tuple(int(d == axis) for d in range(len(shape)))


def _every_entry(shape: Shape, axis: int) -> Strides:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(1, size)
    return tuple(reversed(strides))


Mask = Literal["neuron", "weight", "output", "layer"]

# name: (shape, the axis of input features) -> strides
KINDS: dict[str, Callable[[Shape, int], Strides]] = {
    "neuron": _one_axis,  # one decision per input feature (paper, eq. 8)
    "weight": _every_entry,  # one per entry (mixconnect; with target zero, dropconnect)
    "output": lambda shape, axis: _one_axis(shape, 0),  # one per output feature
    "layer": lambda shape, axis: (0,) * len(shape),  # one for the whole weight
}


def strides_of(kind: str, shape: Shape, axis: int | None = None) -> Strides:
    """The strides of this kind for a weight of this shape; ``axis`` is that of the input features (None: 1, if any)."""
    return KINDS[kind](shape, min(1, len(shape) - 1) if axis is None else axis)


def decides_once(kind: str) -> bool:
    """Whether this kind has one decision for a weight as a whole."""
    return not any(strides_of(kind, (2, 2)))


def fresh_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, so that ``torch.manual_seed`` governs the mask.

    Where it is told to save less than everything (``torch._functorch.config.activation_memory_budget`` below 1), the
    partitioner of compiled code recomputes random numbers in backward, and draws other ones there: the gradients were
    those of another mask. What it never recomputes is a matrix product, so the seed goes through one.
    """
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling():
        return seed
    _check_random_numbers_are_saved()
    # Halves of 32 bits are exact in float64, which autocast leaves alone. (A product with a side of 1 is taken apart.)
    halves = torch.cat([seed >> 32, seed & 0xFFFFFFFF]).to(torch.float64)
    high, low = (halves.expand(2, 2) @ torch.eye(2, dtype=torch.float64, device=device))[:1].to(torch.int64).unbind(1)
    return high << 32 | low


def _check_random_numbers_are_saved() -> bool:
    from torch._functorch import config

    if config.activation_memory_budget == 0:
        raise RuntimeError(
            "mixout_kernels: torch._functorch.config.activation_memory_budget: expected a budget above 0, got 0: it "
            "recomputes every random number in backward, those of torch's dropout too, so that the mask of backward "
            "would not be that of forward. Set a small budget, or give the model a MixSampler, which needs none"
        )
    return True


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: that takes seconds.
_check_random_numbers_are_saved._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Draw(NamedTuple):
    """The decisions for one weight: a seed (an int64 tensor with one element), a threshold, and where to read them."""

    seed: Tensor
    p: float
    strides: Strides
    offset: int = 0

    @property
    def threshold(self) -> int:
        return threshold_of(self.p)

    @property
    def scale(self) -> float:
        return scale_of(self.p)

    def at(self, p: float) -> Draw:
        """The same words against another threshold."""
        return self if p == self.p else Draw(self.seed, p, self.strides, self.offset)

    def t(self) -> Draw:
        """For the transpose of the weight."""
        return Draw(self.seed, self.p, self.strides[::-1], self.offset)

    @property
    def by_column(self) -> bool:
        """Whether one decision serves a whole column of a 2-D weight: its gradient is then a smaller dense product."""
        return shares_columns(self.strides)

    def layout(self, shape: Shape) -> Layout:
        """These decisions over contiguous memory of this shape, for kernels that walk through a matrix."""
        return _layout(tuple(shape), self.strides)


# Draw's properties as functions, for code that compilers trace: torch 2.8 cannot trace a property of a NamedTuple.


def threshold_of(p: float) -> int:
    """A word of 32 bits at or above it keeps its entry; 2^32, which p = 1 gives, is above all of them."""
    return math.floor(p * 2**32)


def scale_of(p: float) -> float:
    """1 / (1 - p), the factor of w - u in a kept entry; 0 where nothing is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def shares_columns(strides: Strides) -> bool:
    return len(strides) == 2 and strides[0] == 0 and strides[1] == 1


class Layout(NamedTuple):
    """Contiguous memory as a matrix of which element (r, c) is decided by
    ``offset + r * row_stride + (c // inner) * column_stride``.
    """

    rows: int
    columns: int
    inner: int
    row_stride: int
    column_stride: int


def _layout(shape: tuple[int, ...], strides: Strides) -> Layout:
    # Neighbouring dimensions whose decisions lie as one dimension's would are merged, from the last to the first.
    merged: list[tuple[int, int]] = []  # (size, stride), the innermost first
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        else:
            merged.append((size, stride))
    inner = 1
    if len(merged) == 3 and merged[0][1] == 0:  # a convolution: the kernel's window shares its feature's decision
        inner = merged.pop(0)[0]
    if len(merged) > 2:
        raise ValueError(f"a mask with strides {strides} over a weight {list(shape)} is no matrix of decisions")
    (columns, column_stride), (rows, row_stride) = (*merged, (1, 0), (1, 0))[:2]
    return Layout(rows, columns * inner, inner, row_stride, column_stride)


class GradientMask(NamedTuple):
    """Which entries of dw = scale * M * (g^T x) survive, and their factor."""

    q: float
    scale: float

    @classmethod
    def of(cls, p: float, grad_p: float = 0.0, *, rescale: bool = True, paper_gradient: bool = False) -> GradientMask:
        """q = 1 - (1 - p)(1 - grad_p); 1 / (1 - p) unless ``paper_gradient``, times 1 / (1 - grad_p) if ``rescale``.

        ``paper_gradient`` is the authors' code (eq. 2 of the paper): no 1 / (1 - p), a factor that Adam hides.
        """
        kept_by_mix = 1.0 if paper_gradient or p == 1 else 1 - p
        kept_by_grad = 1.0 if not rescale or grad_p == 1 else 1 - grad_p
        q = p if grad_p == 0 else 1 - (1 - p) * (1 - grad_p)
        return cls(q, 1 / (kept_by_mix * kept_by_grad))


def column_capacity(in_features: int, q: float) -> int:
    """Columns reserved for x[:, kept] where shapes must not depend on the mask (CUDA graphs, torch.compile).

    Mean plus seven standard deviations of Binomial(in, 1 - q), rounded up to 16 for aligned rows of a GEMM. A draw
    passes it with probability < 2e-12; the gradient of the columns beyond it is then zero, and nothing is overrun.
    """
    mean, sigma = in_features * (1 - q), math.sqrt(in_features * q * (1 - q))
    return min(in_features, math.ceil((mean + 7 * sigma) / 16) * 16)
