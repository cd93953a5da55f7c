"""The public functions: check what a call means, pick a backend, call one operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks, ops, reference
from .backends import MixedWeight, WeightGradient
from .draws import Draw, GradientMask, Mask, Strides, column_capacity, scale_of, shares_columns, strides_of

Backend = Literal["reference", "cpu", "triton", "cuda"]
Schedule = Literal["fused", "staged"]


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    p: float,
    grad_p: float = 0.0,
    rescale: bool = True,
    mask: Mask = "neuron",
    training: bool = True,
    seed: int | Tensor | None = None,
    paper_gradient: bool = False,
    backend: Backend | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    r"""A linear layer over a weight of which a random part is replaced by the target.

    .. code-block:: text

        Phi = u + M_p * (w - u) / (1 - p)      paper, eq. 4;  E Phi = w
        y   = x Phi^T + b
        dx  = g Phi      dw = M_q * (g^T x) / ((1 - p)(1 - grad_p))      db = sum g
        q   = 1 - (1 - p)(1 - grad_p), from the same random word: without grad_p the two masks are one

    Equivalent to, with a fresh mask per call:

    .. code-block:: python

        keep = torch.rand(weight.shape[1]) >= p
        phi = torch.where(keep, target + (weight - target) / (1 - p), target)
        F.linear(input, phi, bias)

    Args:
        input: ``[..., in]``, floating point. Under autocast it is cast, the mix stays in the weight's precision and is
            rounded once, and dw comes back in the weight's dtype.
        weight: w, ``[out, in]``. A transposed view of a contiguous ``[in, out]`` weight costs nothing extra.
        target: u, ``[out, in]``, frozen (it must not require grad); of the weight's dtype or a narrower one. None is
            zero: dropout of the input features (``mask="neuron"``) or dropconnect (``mask="weight"``).
        bias: ``[out]`` or None.
        p: the mix probability in [0, 1]. 0 is ``F.linear(input, weight, bias)``, 1 ``F.linear(input, target, bias)``.
        grad_p: the probability in [0, 1] that an entry which the mix kept gets no gradient (GradDrop, arXiv
            2307.10098, in our reading of it). With p = 0 the layer is ``F.linear`` with a masked dw. 1 makes dw zero.
        rescale: False leaves the factor ``1 / (1 - grad_p)`` out of dw (as Child-Tuning-D and fixed masks do).
        mask: "neuron", one decision per input feature shared by all outputs (paper, eq. 8; backward then needs
            (1 - q) of a dense dw and of a saved input), "weight", one per element, "output", one per output feature,
            or "layer", one for the whole weight.
        training: False is ``F.linear(input, weight, bias)``, without a copy.
        seed: of the mask: an int, or an int64 tensor with one element on the input's device. None draws one from the
            device's default generator, so that ``torch.manual_seed`` governs it.
        paper_gradient: leave ``1 / (1 - p)`` out of dw, as the authors' code does (eq. 2).
        backend: None is the fastest that applies. A named one never falls back: it raises and says why. For a whole
            model see :func:`mixout_kernels.kernels`.
        schedule: None is the faster by measurement; "fused" mixes inside the GEMM, "staged" before it.

    Returns:
        ``[..., out]`` in the input's dtype (autocast's, under autocast).

    Raises:
        ValueError, TypeError: for an argument that does not fit; the message names it.
        RuntimeError: if the named backend or schedule cannot do this here.

    Source: Lee, Cho & Kang, "Mixout", ICLR 2020, https://arxiv.org/abs/1909.11299.
    """
    checks.mixout("mix_linear", weight, target, p, mask, grad_p, rescale)
    checks.choice("mix_linear", "backend", backend, backends.BACKENDS)
    checks.choice("mix_linear", "schedule", schedule, backends.SCHEDULES)
    checks.linear("mix_linear", input, weight, bias, autocast_enabled)
    if not training or (p == 0 and grad_p == 0):
        return F.linear(input, weight, bias)

    draw = Draw(checks.seed_tensor("mix_linear", seed, input.device), p, strides_of(mask, weight.shape))
    phi = MixedWeight(weight, target, None, draw)
    gradient = GradientMask.of(p, grad_p, rescale=rescale, paper_gradient=paper_gradient)
    return sampled_linear(input, phi, bias, gradient, backend=backend, schedule=schedule)[0]


def sampled_linear(
    input: Tensor,
    phi: MixedWeight,
    bias: Tensor | None,
    gradient: GradientMask,
    *,
    kept_input: Tensor | None = None,
    backend: str | None = None,
    schedule: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`mix_linear` of checked arguments and a draw; returns y and x[:, kept] (None from the reference).

    ``phi.operand`` (Phi in the compute dtype) and ``kept_input`` are used where the caller has them already.
    """
    dtype = compute_dtype(input)
    weight, target, operand, draw = phi
    backend, schedule = backends.selected(backend, schedule)
    chosen = _choose(backend, schedule, weight, target, dtype)
    if not torch.compiler.is_compiling():
        plan = _plan_of(chosen, schedule, weight, target, dtype, draw.p, draw.strides, draw.offset, gradient)
        found = plan and plan(input, weight, target, bias, operand, None, kept_input, draw.seed)
        if found:
            return found[:2]
    if input.dtype != dtype:
        input = input.to(dtype)
    if chosen == "reference" or weight.numel() == 0 or input.numel() == 0:
        bias = None if bias is None else bias.to(dtype)
        return F.linear(input, reference.mixed_weight(*phi, gradient, dtype), bias), None
    # Where nothing is mixed the product has its operand already. What follows, backends included, has p < 1.
    if operand is None and draw.p == 0:
        operand = weight.detach().to(dtype)
    elif operand is None and draw.p == 1:
        operand = torch.zeros_like(weight, dtype=dtype) if target is None else target.to(dtype)
    q, scale = gradient
    needed = torch.is_grad_enabled() and weight.requires_grad
    exact = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    wanted = WeightGradient(draw.at(q), scale, _kept_width(weight, draw.strides, q, exact=exact) if needed else 0)
    phi = MixedWeight(weight, target, operand, draw)
    return ops.mix_linear(input, phi, bias, kept_input, wanted, chosen, schedule or "auto")


def linear_plan(
    input: Tensor, weight: Tensor, target: Tensor | None, p: float, strides: Strides, gradient: GradientMask
) -> backends.LinearPlan | None:
    """What :func:`sampled_linear` has just called for these, for a caller that comes again.

    It is of the ``kernels`` context, p, strides and gradient; that a tensor is of another kind the plan itself sees.
    """
    dtype = compute_dtype(input)
    backend, schedule = backends.present()
    chosen = _choose(backend, schedule, weight, target, dtype)
    return _plan_of(chosen, schedule, weight, target, dtype, p, strides, 0, gradient)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where autocast would cast this input, or the input's."""
    if autocast_enabled(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


# Asked once: Dynamo before torch 2.12 cannot trace is_autocast_available.
_HAS_AUTOCAST = {device: torch.amp.is_autocast_available(device) for device in ("cpu", "cuda", "xpu", "mps")}


def autocast_enabled(input: Tensor) -> bool:
    device = input.device.type
    return _HAS_AUTOCAST.get(device, False) and torch.is_autocast_enabled(device)


def mixout(
    weight: Tensor,
    target: Tensor | None,
    *,
    p: float,
    grad_p: float = 0.0,
    rescale: bool = True,
    mask: Mask = "neuron",
    axis: int | None = None,
    training: bool = True,
    seed: int | Tensor | None = None,
    paper_gradient: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """The mixed weight ``Phi = u + M * (w - u) / (1 - p)`` (paper, eq. 4) of any parameter, for layers of your own.

    Args:
        weight: w, of one dimension or more. ``mask="neuron"`` decides once per index on ``axis``, ``mask="output"``
            once per index on axis 0, ``mask="weight"`` once per element, ``mask="layer"`` once.
        target: u, the weight's shape, frozen; None is zero.
        axis: that of the input features. None is axis 1, where a Linear, an Embedding or a convolution has them (0 for
            a 1-D weight). Experts in one tensor ``[expert, out, in]`` want 2, XLNet's ``[in, head, size]`` 0.
        p, grad_p, rescale, mask, training, seed, paper_gradient, backend: as in :func:`mix_linear`.

    Returns:
        A tensor of the weight's shape and dtype; ``weight`` itself in eval mode, and where p and grad_p are 0.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`mix_linear`.
    """
    checks.mixout("mixout", weight, target, p, mask, grad_p, rescale)
    checks.axis("mixout", axis, weight.dim())
    checks.choice("mixout", "backend", backend, backends.BACKENDS)
    if not training or (p == 0 and grad_p == 0):
        return weight
    draw = Draw(checks.seed_tensor("mixout", seed, weight.device), p, strides_of(mask, weight.shape, axis))
    gradient = GradientMask.of(p, grad_p, rescale=rescale, paper_gradient=paper_gradient)
    chosen = _choose(backends.selected(backend, None).backend, None, weight, target, weight.dtype)
    if chosen == "reference" or gradient.q == 1 or weight.numel() == 0:
        return reference.mixed_weight(weight, target, None, draw, gradient, weight.dtype)
    if p == 0:
        target = None  # Phi is w, whatever the target; w * 1 is w bit for bit
    return ops.mixout(weight, target, draw, scale_of(draw.p), gradient, chosen)


def mask_in_place(matrix: Tensor, draw: Draw) -> Tensor:
    """``where(keep, matrix / (1 - p), 0)``, p below 1, written over contiguous memory that the caller owns."""
    chosen = _choose(backends.selected(None, None).backend, None, matrix, None, matrix.dtype)
    if chosen == "reference":
        gradient = GradientMask.of(draw.p, 0.0, rescale=True, paper_gradient=False)
        return matrix.copy_(reference.mixed_weight(matrix, None, None, draw, gradient, matrix.dtype))
    if matrix.numel():
        backends.load(chosen).mixout_list([matrix], [matrix], [None], [draw])
    return matrix


def keep_mask(
    seed: int | Tensor, *, p: float, shape: Sequence[int], mask: Mask = "neuron", axis: int | None = None
) -> Tensor:
    """The mask that the kernels use for a weight of this shape: True where the trainable weight is kept.

    .. code-block:: text

        word(seed, i) = lane i % 4 of Philox4x32-10(key = seed, counter = i // 4)
        keep(i)       = word(seed, i) >= floor(p * 2^32)

    Args:
        seed: an int (the mask is then on the CPU), or an int64 tensor with one element.
        p: the probability that an entry is dropped: of a layer's p for its mix, q for its gradient.
        shape: the weight's shape.
        mask: "neuron": i is the index on ``axis``; "weight": the row-major index; "output": the index on axis 0;
            "layer": 0.
        axis: as in :func:`mixout`.

    Returns:
        bool, of the dimensions that have decisions of their own: ``[in]`` for "neuron", ``shape`` for "weight",
        ``[out]`` for "output", ``[]`` for "layer".
    """
    checks.probability("keep_mask", "p", p)
    checks.kind("keep_mask", mask)
    sizes = checks.shape("keep_mask", shape)
    checks.axis("keep_mask", axis, len(sizes))
    if seed is None:
        raise TypeError("keep_mask: seed: expected an int or an int64 tensor, got None")
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    seed = checks.seed_tensor("keep_mask", seed, device)
    strides = strides_of(mask, sizes, axis)
    own = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if stride]
    return decisions(Draw(seed, p, tuple(stride for _, stride in own)), [size for size, _ in own])


def decisions(draw: Draw, sizes: Sequence[int]) -> Tensor:
    """:func:`keep_mask` of a draw, of these sizes and on the device of its seed."""
    chosen = backends.choose(backends.selected(None, None).backend, None, draw.seed.device.type, *[torch.float32] * 3)
    if chosen == "reference" or draw.p == 1 or 0 in sizes:
        return reference.decisions(draw, sizes)
    return backends.load(chosen).keep_mask(draw, sizes)


def kept_indices(draw: Draw, size: int, *, fixed_number: bool) -> Tensor:
    """The indices of what a draw of one dimension keeps, ascending.

    ``fixed_number``: as many as the kernels have room for, whatever the mask, so that nothing is read from a device:
    behind the kept ones come dropped ones. Of a draw that passes that capacity the kernels leave out the same.
    """
    if draw.p == 1:
        return torch.empty(0, dtype=torch.int64, device=draw.seed.device)
    keep = decisions(draw, [size])
    if not fixed_number:
        return keep.nonzero().flatten()
    return keep.logical_not().byte().argsort(stable=True)[: column_capacity(size, draw.p)]


def _choose(
    backend: str | None, schedule: str | None, weight: Tensor, target: Tensor | None, compute: torch.dtype
) -> str:
    # torch.func transforms plain PyTorch only, and forward-mode derivatives are not the kernels'.
    if backend is None and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return "reference"
    target_dtype = weight.dtype if target is None else target.dtype
    return backends.choose(backend, schedule, weight.device.type, weight.dtype, target_dtype, compute)


def _plan_of(
    chosen: str,
    schedule: str | None,
    weight: Tensor,
    target: Tensor | None,
    dtype: torch.dtype,
    p: float,
    strides: Strides,
    offset: int,
    gradient: GradientMask,
) -> backends.LinearPlan | None:
    if chosen == "reference" or weight.numel() == 0:
        return None
    target_dtype = None if target is None else target.dtype
    width = _kept_width(weight, strides, gradient.q, exact=chosen == "cpu")
    dtypes = weight.dtype, target_dtype, dtype
    call = backends.LinearCall(weight.shape, *dtypes, p, strides, offset, *gradient, width, schedule or "auto")
    return _plan(chosen, call)


@functools.lru_cache(maxsize=1024)
def _plan(chosen: str, call: backends.LinearCall) -> backends.LinearPlan | None:
    return backends.load(chosen).linear_plan(call)


def _kept_width(weight: Tensor, strides: Strides, q: float, *, exact: bool) -> int | None:
    """The columns of x[:, kept] that are saved for backward; see ``backends.WeightGradient``.

    ``exact``: where the host knows the mask, so that exactly the kept columns can be saved.
    """
    if q == 1 or not shares_columns(strides):
        return 0
    return None if exact else column_capacity(weight.shape[1], q)
