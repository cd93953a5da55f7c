"""The registered operators: schemas, shapes for tracing, derivatives. Arguments are checked in ``functional``.

Two operators cover the package. ``mixout`` is its own derivative (the mix is linear in w, with target zero), so it has
no backward operator; ``mix_linear`` has one per direction, because each crossing of the dispatcher costs microseconds.
The kernels behind them live in ``backends``; the ``backend`` argument names one and is never second-guessed here.

What ``mix_linear`` saves for backward: the seed, the parameters by reference, and

    mask="neuron"   x[:, kept], because dw is zero in the columns that are not kept
    mask="weight"   x itself, which is not a copy

never the mask and never a tensor of the weight's size.

A sampler (``sampler.py``) may hand two things in, so that they are made once for many calls: ``mixed``, the weight
Phi, and ``kept_input``, the x[:, kept] that a sibling layer with the same input and the same mask has gathered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backends

_library = torch.library.Library("mixout_kernels", "DEF")

_library.define(
    "mixout(Tensor weight, Tensor? target, Tensor seed, float p, float scale, float gradient_scale, str mask, "
    "str backend) -> Tensor"
)
_library.define(
    "mix_linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, Tensor? mixed, "
    "Tensor? kept_input, float p, str mask, bool paper_gradient, SymInt? saved_columns, str backend, str schedule) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "mix_linear_backward(Tensor grad, Tensor saved_input, Tensor weight, Tensor? target, Tensor seed, Tensor? mixed, "
    "float p, str mask, bool paper_gradient, bool[3] needs, str backend, str schedule) -> (Tensor, Tensor, Tensor)"
)

mixout_op = torch.ops.mixout_kernels.mixout.default
mix_linear_op = torch.ops.mixout_kernels.mix_linear.default
mix_linear_backward_op = torch.ops.mixout_kernels.mix_linear_backward.default


def gradient_scale(p: float, paper_gradient: bool) -> float:
    """The factor of a kept entry in dw: the true derivative 1 / (1 - p), or 1 as in the authors' code (eq. 2)."""
    return 1.0 if paper_gradient or p == 1 else 1 / (1 - p)


def column_capacity(in_features: int, p: float) -> int:
    """Columns reserved for x[:, kept] where shapes must not depend on the mask (CUDA graphs, torch.compile).

    Mean plus seven standard deviations of Binomial(in, 1 - p), rounded up to 16 for aligned GEMM rows. A draw passes
    it with probability < 2e-12; the gradient of the columns beyond it is then zero, and nothing is overrun.
    """
    mean, sigma = in_features * (1 - p), math.sqrt(in_features * p * (1 - p))
    return min(in_features, math.ceil((mean + 7 * sigma) / 16) * 16)


# --- mixout -----------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "mixout", "CompositeExplicitAutograd")
def _mixout_kernel(
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    p: float,
    scale: float,
    gradient_scale: float,
    mask: str,
    backend: str,
) -> Tensor:
    return backends.load(backend).mixout(weight, target, seed, p, scale, mask)


@torch.library.register_fake("mixout_kernels::mixout", lib=_library)
def _mixout_fake(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _mixout_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, seed, ctx.p, _, ctx.gradient_scale, ctx.mask, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _mixout_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    scale = ctx.gradient_scale
    dw = mixout_op(grad, None, seed, ctx.p, scale, scale, ctx.mask, ctx.backend)
    return dw, None, None, None, None, None, None, None


torch.library.register_autograd("mixout_kernels::mixout", _mixout_derivative, setup_context=_mixout_setup, lib=_library)


# --- mix_linear -------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "mix_linear", "CompositeExplicitAutograd")
def _mix_linear_kernel(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    mixed: Tensor | None,
    kept_input: Tensor | None,
    p: float,
    mask: str,
    paper_gradient: bool,
    saved_columns: int | None,
    backend: str,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    columns = saved_columns if kept_input is None else 0
    return backends.load(backend).mix_linear(input, weight, target, bias, seed, p, mask, columns, schedule, mixed)


@torch.library.register_fake("mixout_kernels::mix_linear", lib=_library)
def _mix_linear_fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    mixed: Tensor | None,
    kept_input: Tensor | None,
    p: float,
    mask: str,
    paper_gradient: bool,
    saved_columns: int | None,
    backend: str,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    if kept_input is not None:
        columns: int | torch.SymInt = 0
    elif saved_columns is None:  # exactly the kept columns, whose number is in the seed's value
        columns = torch.library.get_ctx().new_dynamic_size()
    else:
        columns = saved_columns
    rows = math.prod(input.shape[:-1])
    return input.new_empty((*input.shape[:-1], weight.shape[0])), input.new_empty((rows, columns))


def _mix_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, target, _, seed, mixed, kept_input, *settings = inputs
    ctx.p, ctx.mask, ctx.paper_gradient, saved_columns, ctx.backend, ctx.schedule = settings
    ctx.mark_non_differentiable(output[1])
    if ctx.mask == "weight":
        saved_input = input if ctx.needs_input_grad[1] else None
    else:
        saved_input = output[1] if kept_input is None else kept_input
        if ctx.needs_input_grad[1] and kept_input is None and saved_columns == 0 and ctx.p < 1:
            raise RuntimeError("mix_linear: weight requires grad, but saved_columns=0 keeps no input for its gradient")
    ctx.save_for_backward(saved_input, weight, target, seed, mixed)


def _mix_linear_derivative(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved_input, weight, target, seed, mixed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if saved_input is None:
        saved_input = grad.new_empty(0)
    # A graph of the gradients (create_graph=True) needs the operator, which knows that it has no derivative.
    traced = torch.is_grad_enabled() or _is_intercepted(grad, weight)
    call = mix_linear_backward_op if traced else _mix_linear_backward_kernel
    gradients = call(
        grad,
        saved_input,
        weight,
        target,
        seed,
        mixed,
        ctx.p,
        ctx.mask,
        ctx.paper_gradient,
        needs,
        ctx.backend,
        ctx.schedule,
    )
    dx, dw, db = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return dx, dw, None, db, *[None] * 9


class MixLinearFunction(torch.autograd.Function):
    """The same forward and backward without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Not a separate setup_context: torch then binds the arguments by inspect.signature, 50 us a call.
        output = _mix_linear_kernel(*inputs)
        _mix_linear_setup(ctx, inputs, output)
        return output

    backward = staticmethod(_mix_linear_derivative)


torch.library.register_autograd(
    "mixout_kernels::mix_linear", _mix_linear_derivative, setup_context=_mix_linear_setup, lib=_library
)


def mix_linear(input: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y and x[:, kept]; through the operator where something traces or intercepts operators, else past it.

    Forward and backward of a 2 x 4 x 4 layer took 212 us through the registered operator with its generated autograd
    kernel, 112 us this way and 46 us for F.linear (torch 2.13, one Zen 4 core): with the 144 layers of BERT-large
    that is a large part of a training step on a GPU.
    """
    if _is_intercepted(input, weight):
        return mix_linear_op(input, weight, *arguments)
    if torch.is_grad_enabled():
        return MixLinearFunction.apply(input, weight, *arguments)
    return _mix_linear_kernel(input, weight, *arguments)


def _is_intercepted(*tensors: Tensor) -> bool:
    """Whether a compiler, a dispatch mode or a tensor subclass must see an operator."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(tensor) not in _PLAIN_TENSORS for tensor in tensors)
    )


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


@torch.library.impl(_library, "mix_linear_backward", "CompositeExplicitAutograd")
def _mix_linear_backward_kernel(
    grad: Tensor,
    saved_input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    mixed: Tensor | None,
    p: float,
    mask: str,
    paper_gradient: bool,
    needs: list[bool],
    backend: str,
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = gradient_scale(p, paper_gradient)
    return backends.load(backend).mix_linear_backward(
        grad, saved_input, weight, target, seed, p, scale, mask, needs, schedule, mixed
    )


@torch.library.register_fake("mixout_kernels::mix_linear_backward", lib=_library)
def _mix_linear_backward_fake(
    grad: Tensor,
    saved_input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    mixed: Tensor | None,
    p: float,
    mask: str,
    paper_gradient: bool,
    needs: list[bool],
    backend: str,
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor]:
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
