"""CUDA C++ kernels (csrc/cuda) for compute capability 8.0 and later.

``schedule="fused"`` mixes inside the matrix product, on tensor cores for bfloat16 and float16 inputs; "staged" mixes in
a kernel of its own and leaves the product to the vendor library. With ``MIXOUT_KERNELS_CUDA_EMULATION=1`` the same
kernel sources, compiled for the host (tests/cuda/emulation.py), run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension
from .gpu_linear import FUSED_MAX_ROWS

EMULATED = os.environ.get("MIXOUT_KERNELS_CUDA_EMULATION") == "1"

_DEVICE = "cpu" if EMULATED else "cuda"
_EXTENSION = "_cuda_emulated" if EMULATED else "_cuda"
_MINIMUM_CAPABILITY = (8, 0)
_loaded: Any = _extension.load(_EXTENSION)[0]
_TYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def unavailable_reason() -> str | None:
    reason = _extension.load(_EXTENSION)[1]
    if reason or EMULATED:
        return reason or None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _MINIMUM_CAPABILITY:
        return (
            f"the cuda backend needs compute capability 8.0 or later, this device has {'.'.join(map(str, capability))}"
        )
    return None


def schedules(compute: torch.dtype) -> tuple[str, ...]:
    return "fused", "staged"


def premixing_pays(compute: torch.dtype) -> bool:
    return True  # one launch for a model in place of two for each layer, and of autocast's casts


def unsupported_reason(device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype) -> str | None:
    if device != _DEVICE:
        return f"the cuda backend takes tensors on {_DEVICE}, got device {device}"
    if weight not in _TYPES:
        return f"the cuda backend takes float32, bfloat16 and float16 weights, got {weight}"
    if target != weight and (weight, target) != (torch.float32, torch.bfloat16):
        return (
            f"the cuda backend takes a target of the weight's dtype, or bfloat16 for float32, got {target} for {weight}"
        )
    if compute != weight and not (weight == torch.float32 and compute in _TYPES):
        return f"the cuda backend computes in the weight's dtype, or casts float32 down, got {weight} to {compute}"
    return None


def keep_mask(seed: Tensor, p: float, shape: Sequence[int], mask: str) -> Tensor:
    shape = (shape[1],) if mask == "neuron" and len(shape) > 1 else tuple(shape)
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    if p == 1:
        return keep.zero_()
    with _on(seed):
        _loaded.keep_mask(_mask(seed, p), keep.data_ptr(), keep.numel(), _stream(seed.device))
    return keep


def mixout(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, scale: float, mask: str) -> Tensor:
    phi = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if p == 1:
        return phi.zero_() if target is None else phi.copy_(target)
    if weight.dim() < 2 or mask == "weight":
        axis, columns, inner = _loaded.MaskAxis.flat, 1, 1
    else:
        inner = math.prod(weight.shape[2:])
        axis, columns = _loaded.MaskAxis.column, weight.shape[1] * inner
    target = None if target is None else target.contiguous()
    _mix([(weight.contiguous(), target, phi, seed.data_ptr(), columns, inner, axis)], p, scale)
    return phi


def mixout_list(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    seeds: Tensor,
    p: float,
    mask: str,
) -> None:
    tables: dict[tuple[torch.dtype, ...], list[_Entry]] = {}
    for k, (out, weight, target) in enumerate(zip(outs, weights, targets, strict=True)):
        memory, transposed = _in_memory(weight)
        phi = out.t() if transposed else out
        seed = seeds.data_ptr() + k * seeds.element_size()
        types = weight.dtype, weight.dtype if target is None else target.dtype, out.dtype
        entry = _matrix_entry(memory, _like_memory(target, transposed), phi, seed, mask, transposed)
        tables.setdefault(types, []).append(entry)
    for table in tables.values():
        _mix(table, p, 1 / (1 - p))


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    saved_columns: int | None,
    schedule: str,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x = _rows(input)
    if mixed is not None:
        y = F.linear(x, mixed, bias)
    elif p == 1:
        y = F.linear(x, _nothing_kept(weight, target, x.dtype), bias)
    elif _is_fused(x, weight, target, schedule):
        y = _mix_product(x, weight, target, bias, seed, p, mask, features_are_outputs=False)
    else:
        y = F.linear(x, _mixed_weight(weight, target, seed, p, mask, x.dtype), bias)
    if saved_columns is None:
        saved_columns = 0 if mask == "weight" else int(keep_mask(seed, p, weight.shape, mask).sum())
    y = torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], weight.shape[0]))
    return y, _gather_kept(x, seed, p, saved_columns)


def mix_linear_backward(
    grad: Tensor,
    saved_input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    p: float,
    scale: float,
    mask: str,
    needs: Sequence[bool],
    schedule: str,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    g = _rows(grad)
    dx, dw, db = grad.new_empty(0), weight.new_empty(0), grad.new_empty(0)
    if needs[0]:
        if mixed is not None:
            dx = torch.mm(g, mixed)
        elif p == 1:
            dx = torch.mm(g, _nothing_kept(weight, target, g.dtype))
        elif _is_fused(g, weight, target, schedule):
            dx = _mix_product(g, weight, target, None, seed, p, mask, features_are_outputs=True)
        else:
            dx = torch.mm(g, _mixed_weight(weight, target, seed, p, mask, g.dtype))
        dx = dx.view(*grad.shape[:-1], weight.shape[1])
    if needs[1]:
        dw = _weight_gradient(g, _rows(saved_input), weight, seed, p, scale, mask)
    if needs[2]:
        db = g.sum(0)
    return dx, dw, db


# --- the products -----------------------------------------------------------------------------------------------------


# float32 goes past the tensor cores: at 60 TFLOP/s and 4.3 TB/s a product of more rows takes longer than the bytes of w
# and u. Arithmetic, not yet a measurement.
_FUSED_MAX_ROWS_FLOAT32 = 64


def _is_fused(x: Tensor, weight: Tensor, target: Tensor | None, schedule: str) -> bool:
    if 0 in (*x.shape, *weight.shape):
        return False
    if schedule == "auto":
        # Rows that do not start on 16 bytes are copied element by element, without cp.async.
        addresses = (x.data_ptr(), weight.data_ptr(), _address(target))
        if any(n % 8 for n in weight.shape) or any(address % 16 for address in addresses):
            return False
        if x.dtype == torch.float32 and x.shape[0] > _FUSED_MAX_ROWS_FLOAT32:
            return False
    return schedule == "fused" or x.shape[0] <= FUSED_MAX_ROWS


def _mix_product(
    x: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    *,
    features_are_outputs: bool,
) -> Tensor:
    """``x Phi^T + bias``, or ``x Phi`` if the input features are the outputs (dx), Phi never in memory."""
    memory, transposed = _in_memory(weight)
    u = _like_memory(target, transposed)
    outputs, contraction = weight.shape[::-1] if features_are_outputs else weight.shape
    out = x.new_empty(x.shape[0], outputs)
    w_type, u_type, x_type = _type(memory), _type(memory if u is None else u), _type(x)
    with _on(x):
        plan = _loaded.plan_product(x.shape[0], outputs, contraction, w_type, x_type, _multiprocessors(x.device))
        partial = torch.empty(plan.partial_floats, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device, plan.arrivals)
        _loaded.mix_product(
            x=x.data_ptr(),
            w=memory.data_ptr(),
            u=_address(u),
            bias=_address(bias),
            out=out.data_ptr(),
            mask=_mask(seed, p),
            scale=1 / (1 - p),
            rows=x.shape[0],
            outputs=outputs,
            contraction=contraction,
            contiguous=transposed == features_are_outputs,
            features_are_outputs=features_are_outputs,
            per_weight=mask == "weight",
            plan=plan,
            w_type=w_type,
            u_type=u_type,
            x_type=x_type,
            partial=partial.data_ptr(),
            arrivals=arrivals.data_ptr(),
            stream=_stream(x.device),
        )
    return out


def _mixed_weight(
    weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str, dtype: torch.dtype
) -> Tensor:
    """Phi in the compute dtype and in the weight's memory layout."""
    memory, transposed = _in_memory(weight)
    phi = torch.empty_like(memory, dtype=dtype)
    u = _like_memory(target, transposed)
    _mix([_matrix_entry(memory, u, phi, seed.data_ptr(), mask, transposed)], p, 1 / (1 - p))
    return phi.t() if transposed else phi


def _nothing_kept(weight: Tensor, target: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Phi for p = 1."""
    return torch.zeros_like(weight, dtype=dtype) if target is None else target.to(dtype, copy=True)


def _weight_gradient(
    g: Tensor, saved_input: Tensor, weight: Tensor, seed: Tensor, p: float, scale: float, mask: str
) -> Tensor:
    """dw in the weight's dtype and memory layout."""
    memory, transposed = _in_memory(weight)
    if p == 1:
        return torch.zeros_like(weight)
    # [in or kept, out] or [out, in or kept]: the memory layout of dw.
    product = torch.mm(saved_input.t(), g) if transposed else torch.mm(g.t(), saved_input)
    dw = product if product.dtype == weight.dtype and mask == "weight" else torch.empty_like(memory)
    if mask == "weight":
        _mix([_matrix_entry(product, None, dw, seed.data_ptr(), mask, transposed)], p, scale)
    else:
        with _on(g):
            _loaded.scatter_kept(
                mask=_mask(seed, p),
                compact=product.data_ptr(),
                dw=dw.data_ptr(),
                compact_type=_type(product),
                dw_type=_type(dw),
                scale=scale,
                rows=weight.shape[0],
                features=weight.shape[1],
                capacity=saved_input.shape[1],
                transposed=transposed,
                stream=_stream(g.device),
            )
    return dw.t() if transposed else dw


def _gather_kept(x: Tensor, seed: Tensor, p: float, capacity: int) -> Tensor:
    compact = x.new_empty(x.shape[0], capacity)
    if p == 1 or capacity == 0:
        return compact.zero_()
    with _on(x):
        _loaded.gather_kept(
            mask=_mask(seed, p),
            x=x.data_ptr(),
            compact=compact.data_ptr(),
            type=_type(x),
            rows=x.shape[0],
            features=x.shape[1],
            capacity=capacity,
            stream=_stream(x.device),
        )
    return compact


# --- what the launches need -------------------------------------------------------------------------------------------

# weight and target in memory, result, address of the seed, columns of the memory matrix, inner, mask axis
_Entry = tuple[Tensor, "Tensor | None", Tensor, int, int, int, Any]


def _matrix_entry(memory: Tensor, target: Tensor | None, phi: Tensor, seed: int, mask: str, transposed: bool) -> _Entry:
    axes = _loaded.MaskAxis
    if mask == "weight":
        axis = axes.flat_transposed if transposed else axes.flat
    else:
        axis = axes.row if transposed else axes.column
    return memory, target, phi, seed, memory.shape[1], 1, axis


def _mix(entries: Sequence[_Entry], p: float, scale: float) -> None:
    """One launch for weights of one dtype, their targets of one dtype, and results of one dtype."""
    w, u, phi, *_ = entries[0]
    with _on(w):
        _loaded.mix(
            [
                (w.data_ptr(), _address(u), phi.data_ptr(), seed, w.numel(), columns, inner, axis)
                for w, u, phi, seed, columns, inner, axis in entries
            ],
            w=_type(w),
            u=_type(w if u is None else u),
            out=_type(phi),
            threshold=_threshold(p),
            scale=scale,
            stream=_stream(w.device),
        )


def _in_memory(weight: Tensor) -> tuple[Tensor, bool]:
    """The contiguous matrix that holds the weight, and whether that is its transpose ``[in, out]``."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return weight.t(), True
    return weight.contiguous(), False


def _like_memory(target: Tensor | None, transposed: bool) -> Tensor | None:
    if target is None:
        return None
    return (target.t() if transposed else target).contiguous()


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).contiguous()


def _threshold(p: float) -> int:
    return math.floor(p * 2**32)


def _mask(seed: Tensor, p: float) -> tuple[int, int]:
    return seed.data_ptr(), _threshold(p)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _type(t: Tensor) -> Any:
    return getattr(_loaded.Type, _TYPES[t.dtype])


def _on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the tensor's."""
    if EMULATED or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def _stream(device: torch.device) -> int:
    return 0 if EMULATED else torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Four in emulation: small shapes then share a contraction among blocks, as large ones do on a GPU.
    return 4 if EMULATED else torch.cuda.get_device_properties(device).multi_processor_count


_kept_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def _arrivals(device: torch.device, count: int) -> Tensor:
    """Counters that are zero. The kernels leave them so, hence the launches of one stream share them."""
    if EMULATED or torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream: its own counters
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, _stream(device)
    if key not in _kept_arrivals or _kept_arrivals[key].numel() < count:
        _kept_arrivals[key] = torch.as_tensor(_Counters(max(count, 1024), key[1]), device=device)
    return _kept_arrivals[key]


class _Counters:
    """Zeros that stay for good, not from torch's allocator: while Inductor warms a CUDA graph up, that one hands out
    memory of the graph, and nothing but the graph's own outputs may keep it."""

    def __init__(self, count: int, stream: int) -> None:
        address = _loaded.allocate_counters(count, stream)
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<i4", "data": (address, False), "version": 2}
