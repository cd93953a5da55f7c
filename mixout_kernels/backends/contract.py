"""What a backend is. mypy holds every backend module to :class:`Backend`; nothing else knows about backends.

Arguments were checked in ``functional``; p is below 1 wherever a kernel mixes, no size is 0, and
``0 < gradient.q < 1`` wherever a gradient of the weight is asked for: the other cases are settled in ``ops``, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..draws import Draw, Strides


class MixedWeight(NamedTuple):
    """The weight that a product reads: ``operand`` where the caller has it already, else mixed from w and u by draw.

    ``weight`` and ``target`` are ``[out, in]`` in any memory layout (a transposed view of ``[in, out]`` costs nothing
    extra), ``target`` None is zero. ``operand`` is ``[out, in]`` in the compute dtype: Phi made ahead by
    ``mixout_list``, or w itself, or u itself.
    """

    weight: Tensor
    target: Tensor | None
    operand: Tensor | None
    draw: Draw


class WeightGradient(NamedTuple):
    """dw = scale * M * (g^T x), M by ``draw`` (with q as its p); and what of x is kept for it.

    ``width`` is that of the saved x[:, kept], which only a ``draw.by_column`` has: None means exactly the kept columns,
    a number a fixed capacity whose unused columns are zero, 0 that nothing is to be gathered (no gradient is needed, a
    sibling has gathered already, or x itself is saved).
    """

    draw: Draw
    scale: float
    width: int | None


class LinearCall(NamedTuple):
    """What is the same in many calls of the layer: everything but the tensors. csrc/records.h reads it."""

    shape: tuple[int, ...]  # of the weight, [out, in]
    weight: torch.dtype
    target: torch.dtype | None
    compute: torch.dtype
    p: float
    strides: Strides
    offset: int
    q: float
    scale: float
    width: int | None  # as WeightGradient has it, where a gradient of the weight is wanted
    schedule: str


ALL_ROWS = 2**62


class FusedRule(NamedTuple):
    """Which calls fuse: those of fewer rows than this, where the weight is to be mixed and where the operand is there.

    ``aligned``: only where every address is a multiple of 16, and every size of the weight one of 8.
    """

    rows: int
    rows_with_operand: int
    aligned: bool = False

    @classmethod
    def of(cls, schedule: str, auto: FusedRule) -> FusedRule:
        """For "fused", for "staged", or for "auto"."""
        rows = ALL_ROWS if schedule == "fused" else 0
        return auto if schedule == "auto" else cls(rows, rows)


class LinearPlan(Protocol):
    """The layer for calls of one kind, made in C++ (csrc/plan.h) so that nothing is decided in a call of it."""

    @property
    def compute(self) -> torch.dtype: ...

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        operand: Tensor | None,
        cast: Tensor | None,
        kept_input: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y, x[:, kept], and the input in the compute dtype; None where this call is of another kind.

        That is: arguments that do not fit, of which Python says what is wrong; other dtypes; something that traces,
        transforms or intercepts operators. ``cast`` and ``kept_input`` are what a sibling got of this input; a seed
        that is None is drawn. A bias of another dtype is cast here, and db comes back in its own.
        """


class Backend(Protocol):
    def unavailable_reason(self) -> str | None:
        """None, or why it cannot run here, and the cure, in one sentence."""

    def unsupported_reason(
        self, device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype
    ) -> str | None:
        """None, or what of these dtypes it cannot do, in one sentence."""

    def schedules(self, compute: torch.dtype) -> tuple[str, ...]:
        """What it can be asked for with this dtype, of "fused" and "staged"."""

    def premixing_pays(self, compute: torch.dtype) -> bool:
        """Whether Phi made ahead by ``mixout_list`` is faster than Phi mixed in each pass."""

    def keep_mask(self, draw: Draw, shape: Sequence[int]) -> Tensor:
        """The decisions, a bool tensor of this shape (as long as ``draw.strides``) on the device of the seed."""

    def mixout(self, weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
        """``where(keep, u + (w - u) * factor, u)`` for a weight of one dimension or more, in its dtype."""

    def mixout_list(
        self,
        outs: Sequence[Tensor],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor | None],
        draws: Sequence[Draw],
    ) -> None:
        """Writes Phi of weight k ``[out, in]`` by draw k (factor ``draw.scale``) into out k, in one launch.

        out k has the compute dtype and the memory layout of its weight. Every draw has a p and strides of its own.
        """

    def mix_linear(
        self, input: Tensor, phi: MixedWeight, bias: Tensor | None, gradient: WeightGradient, schedule: str
    ) -> tuple[Tensor, Tensor]:
        """y ``[..., out]`` and x[:, kept] ``[rows, width]``; ``schedule`` is "auto" or one of ``schedules``.

        y is no view (its last reshape is ``_unsafe_view``): autograd forbids in-place operations, as of a
        ``ReLU(inplace=True)``, on a view that a Function returns.
        """

    def mixer(
        self,
        outs: Sequence[Tensor],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor | None],
        draws: Sequence[Draw],
    ) -> Callable[[], None]:
        """``mixout_list`` of these with the values that they, and the seeds, have at each call.

        It may hold their addresses: it is for as long as none of them lies elsewhere.
        """

    def linear_plan(self, call: LinearCall) -> LinearPlan | None:
        """``mix_linear`` as autograd records it; None where that is left to ``ops.MixLinearFunction``."""

    def mix_linear_backward(
        self,
        grad: Tensor,
        saved_input: Tensor,
        phi: MixedWeight,
        gradient: WeightGradient,
        needs: tuple[bool, bool, bool],
        schedule: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dw, db; those that ``needs`` does not ask for come back empty.

        ``saved_input`` is x[:, kept] as ``gradient.width`` says for a draw by column, else x ``[..., in]``. A width
        that does not fit the draw raises: it belongs to another mask.
        """
