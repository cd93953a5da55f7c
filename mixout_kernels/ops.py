"""The registered operators: schemas, shapes for tracing, derivatives. Arguments are checked in ``checks``.

Two operators cover the package. ``mixout`` is its own derivative (the mix is linear in w, with target zero), so it has
no backward operator; ``mix_linear`` has one per direction, because each crossing of the dispatcher costs microseconds.
The kernels behind them live in ``backends``; the ``backend`` argument names one and is never second-guessed here.

The order of arguments is the same everywhere: tensors (x, w, u, b, operand, kept), then the draw (seed, p, strides,
offset), the gradient mask (q, scale, width), and the kernels (backend, schedule). In Python they travel as records
(``backends.contract``, :class:`Settings`); only the dispatcher's schemas are flat.

What ``mix_linear`` saves for backward: the seed, the parameters by reference, and

    a draw by column     x[:, kept], because dw is zero in the columns that are not kept
    any other            x itself, which is not a copy

never the mask and never a tensor of the weight's size.

A caller may hand two things in, so that they are made once for many calls: ``operand``, the weight that the product
reads, and ``kept_input``, the x[:, kept] that a sibling layer with the same input and the same mask has gathered.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backends
from .backends import MixedWeight, WeightGradient
from .draws import Draw, GradientMask

_library = torch.library.Library("mixout_kernels", "DEF")

_library.define(
    "mixout(Tensor weight, Tensor? target, Tensor seed, float p, int[] strides, int offset, float factor, float q, "
    "float scale, str backend) -> Tensor"
)
_library.define(
    "mix_linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor? operand, Tensor? kept_input, "
    "Tensor seed, float p, int[] strides, int offset, float q, float scale, SymInt? width, str backend, str schedule) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "mix_linear_backward(Tensor grad, Tensor saved_input, Tensor weight, Tensor? target, Tensor? operand, "
    "Tensor seed, float p, int[] strides, int offset, float q, float scale, SymInt? width, str backend, str schedule, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)"
)

mixout_op = torch.ops.mixout_kernels.mixout.default
mix_linear_op = torch.ops.mixout_kernels.mix_linear.default
mix_linear_backward_op = torch.ops.mixout_kernels.mix_linear_backward.default


# --- mixout -----------------------------------------------------------------------------------------------------------


def mixout(
    weight: Tensor, target: Tensor | None, draw: Draw, factor: float, gradient: GradientMask, backend: str
) -> Tensor:
    """``where(keep, u + (w - u) * factor, u)``, with ``gradient.scale * M_q`` as its derivative by w."""
    seed, p, strides, offset = draw
    return mixout_op(weight, target, seed, p, strides, offset, factor, *gradient, backend)


@torch.library.impl(_library, "mixout", "CompositeExplicitAutograd")
def _mixout_kernel(
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    p: float,
    strides: list[int],
    offset: int,
    factor: float,
    q: float,
    scale: float,
    backend: str,
) -> Tensor:
    return backends.load(backend).mixout(weight, target, Draw(seed, p, tuple(strides), offset), factor)


@torch.library.register_fake("mixout_kernels::mixout", lib=_library)
def _mixout_fake(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _mixout_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, seed, _, ctx.strides, ctx.offset, _, ctx.q, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _mixout_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    gradient = GradientMask(ctx.q, ctx.scale)
    dw = mixout(grad, None, Draw(seed, ctx.q, ctx.strides, ctx.offset), ctx.scale, gradient, ctx.backend)
    return dw, *[None] * 9


torch.library.register_autograd("mixout_kernels::mixout", _mixout_derivative, setup_context=_mixout_setup, lib=_library)


# --- mix_linear -------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What of a call of ``mix_linear`` is no tensor, in the order of the schemas."""

    p: float
    strides: tuple[int, ...]
    offset: int
    q: float
    scale: float
    width: int | None
    backend: str
    schedule: str

    def draw(self, seed: Tensor) -> Draw:
        return Draw(seed, self.p, tuple(self.strides), self.offset)


def mix_linear(
    input: Tensor,
    phi: MixedWeight,
    bias: Tensor | None,
    kept_input: Tensor | None,
    gradient: WeightGradient,
    backend: str,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    """y and x[:, kept]; through the operator where something traces or intercepts operators, else past it.

    Forward and backward of a 2 x 4 x 4 layer took 212 us through the registered operator with its generated autograd
    kernel, 112 us through :class:`MixLinearFunction` and 46 us for F.linear (torch 2.13, one Zen 4 core): with the 144
    layers of BERT-large that is a large part of a training step on a GPU. What a backend's ``linear_plan`` takes over
    does not come here.
    """
    weight, target, operand, (seed, p, strides, offset) = phi
    intercepted = _is_intercepted(input, weight)
    if bias is not None and (bias.dtype != input.dtype or not bias.is_contiguous()):
        bias = bias.to(input.dtype).contiguous()  # a fused GEMM reads it by its address
    settings = Settings(p, strides, offset, gradient.draw.p, gradient.scale, gradient.width, backend, schedule)
    if intercepted:
        return mix_linear_op(input, weight, target, bias, operand, kept_input, seed, *settings)
    if torch.is_grad_enabled():
        return MixLinearFunction.apply(input, weight, target, bias, operand, kept_input, seed, settings)
    return _forward(input, weight, target, bias, operand, kept_input, seed, settings)


def _is_intercepted(*tensors: Tensor) -> bool:
    """Whether a compiler, a dispatch mode or a tensor subclass must see an operator."""
    if torch.compiler.is_compiling():
        return True
    if is_in_torch_dispatch_mode():
        from . import flops  # after this module, whose operators it counts

        flops.tell_active_counters()
        return True
    return any(type(tensor) not in _PLAIN_TENSORS for tensor in tensors)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    operand: Tensor | None,
    kept_input: Tensor | None,
    seed: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    draw = settings.draw(seed)
    gradient = WeightGradient(draw.at(settings.q), settings.scale, settings.width if kept_input is None else 0)
    phi = MixedWeight(weight, target, operand, draw)
    return backends.load(settings.backend).mix_linear(input, phi, bias, gradient, settings.schedule)


def _backward(
    grad: Tensor,
    saved_input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    operand: Tensor | None,
    seed: Tensor,
    settings: Settings,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    draw = settings.draw(seed)
    gradient = WeightGradient(draw.at(settings.q), settings.scale, settings.width)
    phi = MixedWeight(weight, target, operand, draw)
    needs_dx, needs_dw, needs_db = needs
    nothing_kept = needs_dw and settings.q >= 1
    dx, dw, db = backends.load(settings.backend).mix_linear_backward(
        grad, saved_input, phi, gradient, (needs_dx, needs_dw and not nothing_kept, needs_db), settings.schedule
    )
    return dx, torch.zeros_like(weight) if nothing_kept else dw, db


class MixLinearFunction(torch.autograd.Function):
    """Forward and backward without the dispatcher, for backends without a ``linear_plan``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Not a separate setup_context: torch then binds the arguments by inspect.signature, 50 us a call.
        output = _forward(*inputs)
        *tensors, ctx.settings = inputs
        _save(ctx, tensors, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = _gradients(ctx, grad)
        return dx, dw, None, db, *[None] * 4


def _save(ctx: Any, tensors: Any, output: tuple[Tensor, Tensor]) -> None:
    input, weight, target, _, operand, kept_input, seed = tensors
    settings = ctx.settings
    ctx.mark_non_differentiable(output[1])
    saved_input = None
    if ctx.needs_input_grad[1] and settings.q < 1:
        if not settings.draw(seed).by_column:
            saved_input = input
        elif kept_input is not None:
            saved_input = kept_input
        elif settings.width == 0:
            raise RuntimeError("mix_linear: weight requires grad, but width=0 keeps no input for its gradient")
        else:
            saved_input = output[1]
    ctx.save_for_backward(saved_input, weight, target, operand, seed)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved_input, weight, target, operand, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    if saved_input is None:
        saved_input = grad.new_empty(0)
    # A graph of the gradients (create_graph=True) needs the operator, which knows that it has no derivative.
    if torch.is_grad_enabled() or _is_intercepted(grad, weight):
        gradients = mix_linear_backward_op(grad, saved_input, weight, target, operand, seed, *ctx.settings, list(needs))
    else:
        gradients = _backward(grad, saved_input, weight, target, operand, seed, ctx.settings, needs)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


# The same functions as operators, whose arguments come flat.


@torch.library.impl(_library, "mix_linear", "CompositeExplicitAutograd")
def _mix_linear_kernel(*flat: Any) -> tuple[Tensor, Tensor]:
    input, weight, target, bias, operand, kept_input, seed, *settings = flat
    return _forward(input, weight, target, bias, operand, kept_input, seed, Settings(*settings))


@torch.library.register_fake("mixout_kernels::mix_linear", lib=_library)
def _mix_linear_fake(*flat: Any) -> tuple[Tensor, Tensor]:
    input, weight, kept_input, settings = flat[0], flat[1], flat[5], Settings(*flat[7:])
    columns: int | torch.SymInt | None = settings.width if kept_input is None else 0
    if columns is None:  # exactly the kept columns, whose number is in the seed's value
        columns = torch.library.get_ctx().new_dynamic_size()
    rows = math.prod(input.shape[:-1])
    return input.new_empty((*input.shape[:-1], weight.shape[0])), input.new_empty((rows, columns))


def _mix_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = Settings(*inputs[7:])
    _save(ctx, inputs[:7], output)


def _mix_linear_derivative(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, db = _gradients(ctx, grad)
    return dx, dw, None, db, *[None] * 11


torch.library.register_autograd(
    "mixout_kernels::mix_linear", _mix_linear_derivative, setup_context=_mix_linear_setup, lib=_library
)


@torch.library.impl(_library, "mix_linear_backward", "CompositeExplicitAutograd")
def _mix_linear_backward_kernel(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, saved_input, weight, target, operand, seed, *settings, needs = flat
    return _backward(grad, saved_input, weight, target, operand, seed, Settings(*settings), tuple(needs))


@torch.library.register_fake("mixout_kernels::mix_linear_backward", lib=_library)
def _mix_linear_backward_fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, weight, needs = flat[0], flat[2], flat[-1]
    # A gradient that nobody needs is an empty tensor: operators cannot return None.
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if needs[0] else 0),
        torch.empty_like(weight) if needs[1] else weight.new_empty(0),
        grad.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "mix_linear: second derivatives exist only with backend='reference'; got a double backward through the fused "
        "kernels. Use mix_linear(..., backend='reference'), or F.linear(x, mixout(weight, target, ...), bias)."
    )


torch.library.register_autograd("mixout_kernels::mix_linear_backward", _no_second_derivative, lib=_library)
