"""The public functions: check what a call means, pick a backend, call one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops, reference

Mask = Literal["neuron", "weight"]
Backend = Literal["reference", "cpu", "triton", "cuda"]
Schedule = Literal["fused", "staged"]


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    p: float,
    mask: Mask = "neuron",
    training: bool = True,
    seed: int | Tensor | None = None,
    paper_gradient: bool = False,
    backend: Backend | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    r"""A linear layer over a weight of which a random part is replaced by the target.

    .. code-block:: text

        Phi = u + M * (w - u) / (1 - p)        paper, eq. 4;  E Phi = w
        y   = x Phi^T + b
        dx  = g Phi      dw = M / (1 - p) * (g^T x)      db = sum g

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
        mask: "neuron", one decision per input feature shared by all outputs (paper, eq. 8; backward then needs
            (1 - p) of a dense dw and of a saved input), or "weight", one per element.
        training: False is ``F.linear(input, weight, bias)``, without a copy.
        seed: of the mask: an int, or an int64 tensor with one element on the input's device. None draws one from the
            device's default generator, so that ``torch.manual_seed`` governs it.
        paper_gradient: give w the gradient of the authors' code, ``M * (g^T x)`` without ``1 / (1 - p)`` (eq. 2).
        backend: None is the fastest that applies. A named one never falls back: it raises and says why.
        schedule: None is the faster by measurement; "fused" mixes inside the matrix product, "staged" before it.

    Returns:
        ``[..., out]`` in the input's dtype (autocast's, under autocast).

    Raises:
        ValueError, TypeError: for an argument that does not fit; the message names it.
        RuntimeError: if the named backend or schedule cannot do this here.

    Source: Lee, Cho & Kang, "Mixout", ICLR 2020, https://arxiv.org/abs/1909.11299.
    """
    check_mixout("mix_linear", weight, target, p, mask)
    _check_choice("mix_linear", "backend", backend, (None, "reference", *backends.KERNELS))
    _check_choice("mix_linear", "schedule", schedule, (None, "fused", "staged"))
    _check_linear(input, weight, bias)
    if not training or p == 0:
        return F.linear(input, weight, bias)

    seed = _seed_tensor("mix_linear", seed, input.device)
    y, _ = sampled_linear(input, weight, target, bias, p, mask, seed, paper_gradient, backend, schedule)
    return y


def sampled_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    p: float,
    mask: str,
    seed: Tensor,
    paper_gradient: bool = False,
    backend: str | None = None,
    schedule: str | None = None,
    mixed: Tensor | None = None,
    kept_input: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`mix_linear` of checked arguments and a drawn seed; returns y and x[:, kept] (None from the reference).

    ``mixed`` (Phi in the compute dtype) and ``kept_input`` are used where the caller has them already.
    """
    device = input.device.type
    dtype = compute_dtype(input)
    if input.dtype != dtype:
        input = input.to(dtype)
    if bias is not None:
        bias = bias.to(dtype).contiguous()  # a fused product reads it by its address
    target_dtype = weight.dtype if target is None else target.dtype
    chosen = _choose(backend, schedule, device, weight.dtype, target_dtype, dtype)
    if chosen == "reference":
        y = reference.mix_linear(input, weight, target, bias, p=p, mask=mask, seed=seed, paper_gradient=paper_gradient)
        return y, None
    return ops.mix_linear(
        input,
        weight,
        target,
        bias,
        seed,
        mixed,
        kept_input,
        float(p),
        mask,
        paper_gradient,
        _saved_columns(weight, p, mask),
        chosen,
        schedule or "auto",
    )


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where autocast would cast this input, or the input's."""
    device = input.device.type
    if _autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def _autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def mixout(
    weight: Tensor,
    target: Tensor | None,
    *,
    p: float,
    mask: Mask = "neuron",
    training: bool = True,
    seed: int | Tensor | None = None,
    paper_gradient: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """The mixed weight ``Phi = u + M * (w - u) / (1 - p)`` (paper, eq. 4) of any parameter, for layers of your own.

    Args:
        weight: w, of one dimension or more. ``mask="neuron"`` decides once per index on axis 1, the input features of
            a Linear, an Embedding or a convolution; ``mask="weight"``, or a 1-D weight, once per element.
        target: u, the weight's shape, frozen; None is zero.
        p, mask, training, seed, paper_gradient, backend: as in :func:`mix_linear`.

    Returns:
        A tensor of the weight's shape and dtype; ``weight`` itself in eval mode or for p = 0.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`mix_linear`.
    """
    check_mixout("mixout", weight, target, p, mask)
    _check_choice("mixout", "backend", backend, (None, "reference", *backends.KERNELS))
    if not training or p == 0:
        return weight
    seed = _seed_tensor("mixout", seed, weight.device)
    target_dtype = weight.dtype if target is None else target.dtype
    chosen = _choose(backend, None, weight.device.type, weight.dtype, target_dtype, weight.dtype)
    if chosen == "reference":
        return reference.mixout(weight, target, p=p, mask=mask, seed=seed, paper_gradient=paper_gradient)
    scale = ops.gradient_scale(p, paper_gradient=False)
    return ops.mixout_op(weight, target, seed, float(p), scale, ops.gradient_scale(p, paper_gradient), mask, chosen)


def keep_mask(seed: int | Tensor, *, p: float, shape: Sequence[int], mask: Mask = "neuron") -> Tensor:
    """The mask that the kernels use for a weight of this shape: True where the trainable weight is kept.

    .. code-block:: text

        word(seed, i) = lane i % 4 of Philox4x32-10(key = seed, counter = i // 4)
        keep(i)       = word(seed, i) >= floor(p * 2^32)

    Args:
        seed: an int (the mask is then on the CPU), or an int64 tensor with one element.
        p: the mix probability: an entry is kept with probability 1 - p.
        shape: the weight's shape.
        mask: "neuron": i is the index on axis 1; "weight": i is the row-major index.

    Returns:
        bool, ``[shape[1]]`` for "neuron", ``shape`` for "weight" and for a 1-D shape.
    """
    _check_probability("keep_mask", p)
    _check_choice("keep_mask", "mask", mask, ("neuron", "weight"))
    if not isinstance(shape, Sequence):
        raise TypeError(f"keep_mask: shape: expected a sequence of sizes, got {type(shape).__name__}")
    shape = tuple(shape)
    if not shape or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"keep_mask: shape: expected one or more sizes >= 0, got {shape}")
    if seed is None:
        raise TypeError("keep_mask: seed: expected an int or an int64 tensor, got None")
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    seed = _seed_tensor("keep_mask", seed, device)
    chosen = backends.choose(None, None, device.type, *[torch.float32] * 3)
    if chosen == "reference":
        return reference.keep_mask(seed, p=p, shape=shape, mask=mask)
    return backends.load(chosen).keep_mask(seed, float(p), shape, mask)


def check_mixout(name: str, weight: Tensor, target: Tensor | None, p: float, mask: str) -> None:
    """Raises the errors that a call with these would raise; for modules, which hold them long before the first call."""
    _check_probability(name, p)
    _check_choice(name, "mask", mask, ("neuron", "weight"))
    _check_weight_and_target(name, weight, target)


def _choose(backend: str | None, *inputs: Any) -> str:
    # torch.func transforms plain PyTorch only, and forward-mode derivatives are not the kernels'.
    if backend is None and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return "reference"
    return backends.choose(backend, *inputs)


def _saved_columns(weight: Tensor, p: float, mask: str) -> int | None:
    """How much of x[:, kept] the operator is to return for backward; see ``backends``."""
    if mask == "weight" or not (torch.is_grad_enabled() and weight.requires_grad):
        return 0
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        return None  # the host knows the mask, so it can save exactly the kept columns
    return ops.column_capacity(weight.shape[1], p)


def _seed_tensor(name: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"{name}: seed: expected an int64 tensor with one element, got {seed.dtype} {list(seed.shape)}"
            )
        if seed.device != device:
            raise ValueError(f"{name}: seed: expected a tensor on {device}, got one on {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name}: seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name}: seed: expected 64 bits, got {seed}")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def _check_probability(name: str, p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: p: expected a number in [0, 1], got {type(p).__name__}")
    if not 0 <= p <= 1:  # also NaN
        raise ValueError(f"{name}: p: expected a number in [0, 1], got {p}")


def _check_choice(name: str, argument: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_tensor(name: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: {argument}: expected a floating-point tensor, got {value.dtype}")


def _check_weight_and_target(name: str, weight: Tensor, target: Tensor | None) -> None:
    _check_tensor(name, "weight", weight)
    if weight.dim() == 0:
        raise ValueError(f"{name}: weight: expected one dimension or more, got a scalar")
    if target is None:
        return
    _check_tensor(name, "target", target)
    if target.shape != weight.shape:
        raise ValueError(f"{name}: target: expected the weight's shape {list(weight.shape)}, got {list(target.shape)}")
    if target.device != weight.device:
        raise ValueError(f"{name}: target: expected the weight's device {weight.device}, got {target.device}")
    if target.dtype != weight.dtype and target.dtype.itemsize >= weight.dtype.itemsize:
        raise TypeError(
            f"{name}: target: expected the weight's dtype {weight.dtype} or a narrower one, got {target.dtype}"
        )
    if target.requires_grad:
        raise ValueError(f"{name}: target: expected a frozen tensor, got one that requires grad; use target.detach()")


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_tensor("mix_linear", "input", input)
    if weight.dim() != 2:
        raise ValueError(f"mix_linear: weight: expected [out, in], got {list(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"mix_linear: input: expected [..., {weight.shape[1]}] for a weight {list(weight.shape)}, "
            f"got {list(input.shape)}"
        )
    if input.device != weight.device:
        raise ValueError(f"mix_linear: input: expected the weight's device {weight.device}, got {input.device}")
    autocast = _autocast_enabled(input.device.type)
    if input.dtype != weight.dtype and not autocast:
        raise TypeError(f"mix_linear: input: expected the weight's dtype {weight.dtype}, got {input.dtype}")
    if bias is None:
        return
    _check_tensor("mix_linear", "bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"mix_linear: bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"mix_linear: bias: expected the weight's device {weight.device}, got {bias.device}")
    if bias.dtype != weight.dtype and not autocast:
        raise TypeError(f"mix_linear: bias: expected the weight's dtype {weight.dtype}, got {bias.dtype}")
