"""The kernels, one module per backend, imported on first use. They never import one another.

Every backend module has the same names, called with checked arguments:

    schedules(compute)                              what it can be asked for with this dtype, of "fused" and "staged"
    premixing_pays(compute)                         whether Phi made ahead by mixout_list is faster than mixed in place
    unavailable_reason()                                            None, or why it cannot run here, and the cure
    unsupported_reason(device, weight, target, compute)             None, or what of these dtypes it cannot do
    keep_mask(seed, p, shape, mask)                                                                 -> bool tensor
    mixout(weight, target, seed, p, scale, mask)                                                    -> Phi
    mixout_list(outs, weights, targets, seeds, p, mask)                                             writes outs
    mix_linear(input, weight, target, bias, seed, p, mask, saved_columns, schedule, mixed)          -> y, x[:, kept]
    mix_linear_backward(grad, saved_input, weight, target, seed, p, scale, mask, needs, schedule, mixed) -> dx, dw, db

``mixout_list`` mixes any number of 2-D weights in one launch: weight and target k (``targets`` holds tensors and None)
by the k-th element of the int64 tensor ``seeds``, one p < 1 and one mask for all, into out k, which has the compute
dtype and the memory layout of its weight.

``saved_columns`` is the width of the returned x[:, kept]: None means exactly the kept columns, a number a fixed
capacity whose unused columns are zero, 0 that nothing is kept for backward. ``mixed`` is Phi where the caller has it
already (from ``mixout_list``), else None. ``scale`` in ``mixout`` is the factor of w - u in a kept entry, in
``mix_linear_backward`` the factor of a kept entry of dw. Gradients that ``needs`` does not ask for come back empty.
``schedule`` is "auto" or one of schedules(compute).

y must not be a view, so its last reshape is ``_unsafe_view``: autograd forbids in-place operations, as of a
``ReLU(inplace=True)``, on a view that a Function returns.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

# "reference" is not a module here: it is plain PyTorch, differentiated by autograd, and never passes through a
# registered operator.
KERNELS = ("cpu", "triton", "cuda")
# In order of preference on each type of device. Starting a Triton kernel takes 12 us of Python, one of csrc/cuda 2 us
# (one Zen 5 core), and a training step of BERT-large starts 240.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def choose(
    name: str | None, schedule: str | None, device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype
) -> str:
    """The backend to use: ``name`` if it can do this, or else an error that says why; for None the first that can."""
    if name == "reference":
        if schedule is not None:
            raise RuntimeError(f"schedule={schedule!r} was asked for, but the reference follows none")
        return name
    reasons = {}
    for candidate in PREFERENCE.get(device, ()) if name is None else (name,):
        reason = _reason_against(candidate, schedule, device, weight, target, compute)
        if reason is None:
            return candidate
        if name is not None:
            raise RuntimeError(f"backend={name!r} was asked for, but {reason}")
        reasons[candidate] = reason
    if schedule is None:
        for candidate, reason in reasons.items():
            _say_once(f"backend {candidate!r} is not used: {reason}")
    else:
        why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items()) or f"none is for {device}"
        raise RuntimeError(f"schedule={schedule!r} was asked for, but no backend can follow it here ({why})")
    return "reference"


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: that takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _reason_against(
    name: str, schedule: str | None, device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype
) -> str | None:
    try:
        backend = load(name)
    except ModuleNotFoundError as error:
        return f"the {name} backend could not be imported: {error}"
    if reason := backend.unavailable_reason() or backend.unsupported_reason(device, weight, target, compute):
        return reason
    schedules = backend.schedules(compute)
    if schedule is not None and schedule not in schedules:
        return f"for {compute} it has the schedules {', '.join(schedules)} here, got schedule={schedule!r}"
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(f"mixout_kernels: {message}", stacklevel=5)
