"""The kernels of csrc/cuda as functions of tensors: the primitives of ``gpu_linear``, and mixes of any weight.

A kernel takes addresses of contiguous memory and runs on the current device and stream; this module knows what that
takes of a tensor. A matrix that lies transposed in memory is handed over as its transpose, with the strides of its
mask exchanged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ...draws import Draw
from .. import gpu_linear
from ..contract import FusedRule

EMULATED = os.environ.get("MIXOUT_KERNELS_CUDA_EMULATION") == "1"
EXTENSION = "_cuda_emulated" if EMULATED else "_cuda"
_loaded: Any = _extension.load(EXTENSION)[0]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# The C++ enumeration; None where nothing was built, which is said before anything is called.
TYPES: dict[torch.dtype, Any] = {dtype: _loaded and getattr(_loaded.Type, name) for dtype, name in _NAMES.items()}


# --- masks and mixes --------------------------------------------------------------------------------------------------


def keep_mask(draw: Draw, shape: Sequence[int]) -> Tensor:
    keep = torch.empty(tuple(shape), dtype=torch.bool, device=draw.seed.device)
    if draw.p == 1:  # a threshold above every word, which 32 bits cannot hold
        return keep.zero_()
    layout = draw.layout(shape)
    mask = _mask(draw, layout.row_stride, layout.column_stride, layout.inner)
    with _on(keep):
        _loaded.keep_mask(mask, keep.data_ptr(), layout.rows, layout.columns, _stream(keep.device))
    return keep


def mixout(weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
    phi = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    w, u = weight.contiguous(), None if target is None else target.contiguous()
    layout = draw.layout(weight.shape)
    mask = _mask(draw, layout.row_stride, layout.column_stride, layout.inner)
    _mix([_loaded.MixTensor(w.data_ptr(), _address(u), phi.data_ptr(), mask, w.numel(), layout.columns, factor)],
         w, u, phi)  # fmt: skip
    return phi


def mix_into(out: Tensor, weight: Tensor, target: Tensor | None, draw: Draw, factor: float) -> Tensor:
    _mix_matrices([(out, weight, target, draw, factor)])
    return out


def mixout_list(
    outs: Sequence[Tensor], weights: Sequence[Tensor], targets: Sequence[Tensor | None], draws: Sequence[Draw]
) -> None:
    mixer(outs, weights, targets, draws)()


def mixer(
    outs: Sequence[Tensor], weights: Sequence[Tensor], targets: Sequence[Tensor | None], draws: Sequence[Draw]
) -> Callable[[], None]:
    scales = [draw.scale for draw in draws]

    def tables() -> list[_Table]:
        return _tables(zip(outs, weights, targets, draws, scales, strict=True))

    present = tables()
    if any(table.has_copies for table in present):
        return lambda: _mix_all(tables())  # of the values that they have then
    return lambda: _mix_all(present)


class _Table(NamedTuple):
    """The matrices of one launch, all of the same dtypes, and the tensors that their addresses are of."""

    records: list[Any]
    tensors: list[tuple[Tensor, Tensor | None, Tensor, Tensor]]  # w, u, out, seed
    has_copies: bool  # one of them was brought into another layout


def _mix_matrices(matrices: Iterable[tuple[Tensor, Tensor, Tensor | None, Draw, float]]) -> None:
    """(out, weight, target, draw, factor) of any number: a launch for every combination of dtypes."""
    _mix_all(_tables(matrices))


def _tables(matrices: Iterable[tuple[Tensor, Tensor, Tensor | None, Draw, float]]) -> list[_Table]:
    tables: dict[tuple[torch.dtype, ...], list[tuple[Any, tuple[Tensor, Tensor | None, Tensor, Tensor], bool]]] = {}
    for out, weight, target, draw, factor in matrices:
        transposed = _result_is_transposed(out)
        w, u = _in_memory(weight, transposed), None if target is None else _in_memory(target, transposed)
        columns = out.shape[0 if transposed else 1]
        record = _loaded.MixTensor(
            w.data_ptr(), _address(u), out.data_ptr(), _matrix_mask(draw, transposed), out.numel(), columns, factor
        )
        copied = w.data_ptr() != weight.data_ptr() or (target is not None and _address(u) != target.data_ptr())
        types = w.dtype, w.dtype if u is None else u.dtype, out.dtype
        tables.setdefault(types, []).append((record, (w, u, out, draw.seed), copied))
    return [
        _Table([record for record, _, _ in rows], [tensors for _, tensors, _ in rows], any(row[2] for row in rows))
        for rows in tables.values()
    ]


def _mix_all(tables: list[_Table]) -> None:
    for table in tables:
        _mix(table.records, *table.tensors[0][:3])


def _mix(records: list[Any], w: Tensor, u: Tensor | None, out: Tensor) -> None:
    """One launch; w, u and out are those of one record, of which all have the dtypes."""
    with _on(w):
        _loaded.mix(records, _type(w), _type(w if u is None else u), _type(out), _stream(w.device))


# --- kept columns -----------------------------------------------------------------------------------------------------


def gather_columns(x: Tensor, draw: Draw, width: int) -> Tensor:
    x = x.contiguous()
    rows, features = x.shape
    compact = x.new_empty(rows, width)
    with _on(x):
        _loaded.gather_kept(
            mask=_matrix_mask(draw, False),
            x=x.data_ptr(),
            compact=compact.data_ptr(),
            type=_type(x),
            rows=rows,
            features=features,
            capacity=width,
            stream=_stream(x.device),
        )
    return compact


def scatter_columns(compact: Tensor, out: Tensor, draw: Draw, scale: float) -> Tensor:
    _scatter(compact, out, draw, scale, _loaded.ColumnSums(0, 0, _type(compact), 0, 0))
    return out


def scatter_columns_and_sum(compact: Tensor, out: Tensor, draw: Draw, scale: float, g: Tensor) -> Tensor:
    if g.numel() == 0:
        scatter_columns(compact, out, draw, scale)
        return g.sum(0)
    db = g.new_empty(g.shape[1])
    sums = _loaded.ColumnSums(g=g.data_ptr(), sums=db.data_ptr(), type=_type(db), rows=len(g), stride=g.stride(0))
    _scatter(compact, out, draw, scale, sums)
    return db


def _scatter(compact: Tensor, out: Tensor, draw: Draw, scale: float, sums: Any) -> None:
    transposed = _result_is_transposed(out)
    memory = _in_memory(compact, transposed)
    with _on(out):
        _loaded.scatter_kept(
            mask=_matrix_mask(draw, False),
            compact=memory.data_ptr(),
            dw=out.data_ptr(),
            compact_type=_type(memory),
            dw_type=_type(out),
            scale=scale,
            rows=out.shape[0],
            features=out.shape[1],
            capacity=compact.shape[1],
            transposed=transposed,
            sums=sums,
            stream=_stream(out.device),
        )


def fused_weight_gradient(g: Tensor, saved: Tensor, weight: Tensor, draw: Draw, scale: float, needs_db: bool) -> None:
    """By the vendor's GEMM in both schedules: where the kept columns lie side by side there is nothing to fuse."""


# --- the fused GEMM ---------------------------------------------------------------------------------------------------

# float32 goes past the tensor cores: at 60 TFLOP/s and 4.3 TB/s a product of more rows takes longer than the bytes of w
# and u. Arithmetic, not yet a measurement.
_FUSED_MAX_ROWS_FLOAT32 = 64


def fused_rule(compute: torch.dtype) -> FusedRule:
    """For schedule "auto". Rows that do not start on 16 bytes are copied element by element, without cp.async."""
    rows = _FUSED_MAX_ROWS_FLOAT32 if compute == torch.float32 else gpu_linear.FUSED_MAX_ROWS
    return FusedRule(rows + 1, 0, aligned=True)


def prefers_fused(x: Tensor, weight: Tensor, target: Tensor | None) -> bool:
    addresses = x.data_ptr() | weight.data_ptr() | _address(target)
    if addresses % 16 or weight.shape[0] % 8 or weight.shape[1] % 8:
        return False
    return x.numel() // x.shape[-1] < fused_rule(x.dtype).rows


def fused_linear(
    x: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, draw: Draw, gather: Draw, width: int
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y = _mix_product(x, weight, target, bias, draw)
    return y, gather_columns(x, gather, width) if width else x.new_empty(x.shape[0], 0)


def fused_input_gradient(g: Tensor, weight: Tensor, target: Tensor | None, draw: Draw) -> Tensor:
    return _mix_product(g.contiguous(), weight.t(), None if target is None else target.t(), None, draw.t())


def _mix_product(x: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, draw: Draw) -> Tensor:
    """``x Phi^T + bias`` for Phi like weight ``[outputs, contraction]``, never in memory."""
    transposed = _is_transposed(weight)
    w, u = _in_memory(weight, transposed), None if target is None else _in_memory(target, transposed)
    rows, outputs, contraction = x.shape[0], *weight.shape
    out = x.new_empty(rows, outputs)
    w_type, u_type, x_type = _type(w), _type(w if u is None else u), _type(x)
    with _on(x):
        plan = _loaded.plan_product(rows, outputs, contraction, w_type, x_type, _multiprocessors())
        partial = torch.empty(plan.partial_floats, dtype=torch.float32, device=x.device)
        arrivals, _own = _arrivals(x.device, plan.arrivals) if plan.arrivals else (0, None)
        product = _loaded.Product(
            x=x.data_ptr(),
            w=w.data_ptr(),
            u=_address(u),
            bias=_address(bias),
            out=out.data_ptr(),
            mask=_matrix_mask(draw, False),
            scale=draw.scale,
            rows=rows,
            outputs=outputs,
            contraction=contraction,
            contiguous=not transposed,
        )
        stream = _stream(x.device)
        _loaded.mix_product(product, plan, w_type, u_type, x_type, partial.data_ptr(), arrivals, stream)
    return out


# --- what the launches need -------------------------------------------------------------------------------------------


def _mask(draw: Draw, row_stride: int, column_stride: int, inner: int = 1) -> Any:
    return _loaded.Mask(draw.seed.data_ptr(), draw.p, draw.offset, row_stride, column_stride, inner)


def _matrix_mask(draw: Draw, transposed: bool) -> Any:
    rows, columns = draw.strides
    return _mask(draw, columns, rows) if transposed else _mask(draw, rows, columns)


def _is_transposed(matrix: Tensor) -> bool:
    """Whether the transpose is what lies in memory row by row."""
    return not matrix.is_contiguous() and matrix.t().is_contiguous()


def _result_is_transposed(out: Tensor) -> bool:
    transposed = _is_transposed(out)
    if not transposed and not out.is_contiguous():
        raise ValueError(f"the cuda backend writes matrices without gaps, got {list(out.shape)} with {out.stride()}")
    return transposed


def _in_memory(matrix: Tensor, transposed: bool) -> Tensor:
    """The matrix, or its transpose, row by row."""
    return (matrix.t() if transposed else matrix).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _type(t: Tensor) -> Any:
    return TYPES[t.dtype]


def _on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the tensor's."""
    if EMULATED or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def _stream(device: torch.device) -> int:
    # Not torch.cuda.current_stream: it makes an object of the stream first, 3 us.
    return 0 if EMULATED else torch._C._cuda_getCurrentRawStream(device.index)


def launchers_and_stream() -> tuple[Any, Callable[[int], int]]:
    """What host code in C++ starts the kernels with: where, by the index of a device."""
    return _loaded.launchers, (lambda index: 0) if EMULATED else torch._C._cuda_getCurrentRawStream


def _multiprocessors() -> int:
    """Of the current device."""
    return _loaded.multiprocessors()


def _arrivals(device: torch.device, count: int) -> tuple[int, Tensor | None]:
    """The address of counters that are zero, and the tensor that holds them if they are this launch's own.

    The kernels leave them zero, hence the launches of one stream share them.
    """
    if address := _loaded.kept_arrivals(count, _stream(device)):
        return address, None
    own = torch.zeros(count, dtype=torch.int32, device=device)
    return own.data_ptr(), own
