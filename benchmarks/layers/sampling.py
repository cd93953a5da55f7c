"""How one sample is taken: forward of every operand set, then backward of every one, as a network does.

On a GPU a sample is N launches with one synchronisation, timed by CUDA events: without a synchronisation one times the
launch, and with one per call it costs more than a small kernel. The N operand sets are distinct and together larger
than the L2 cache, so no call finds its weight there. By default each phase is a CUDA graph: it shows the device's time
where an eager call of a small layer shows Python's. ``eager`` shows that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Operands
from .interleave import Sample, Sampler
from .variants import Layer


@dataclass
class Phases:
    """A layer over a number of operand sets."""

    layer: Layer
    operands: Sequence[Operands]
    has_backward: bool

    def forward(self) -> list[Tensor]:
        return [self.layer(o) for o in self.operands]

    def backward(self, outputs: list[Tensor]) -> None:
        if self.has_backward:
            for y, o in zip(outputs, self.operands, strict=True):
                torch.autograd.grad(y, o.differentiable, o.grad)


def operand_sets(case: Case, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(device)
    beyond_cache = math.ceil(3 * properties.L2_cache_size / case.operand_bytes)
    # Besides its operands a call keeps its output and what it saves for backward: no more than twice the operands.
    fitting = torch.cuda.mem_get_info(device)[0] // (4 * case.operand_bytes)
    return max(1, min(64, max(8, beyond_cache), fitting))


def make_sampler(phases: Phases, device: torch.device, launch: str, pool: Any) -> Sampler:
    """``launch``: "graph" or "eager", on a GPU; ``pool``: the graphs' memory, shared since only one runs at a time."""
    if device.type == "cpu":
        return _cpu_sampler(phases)
    return _graph_sampler(phases, pool) if launch == "graph" else _eager_sampler(phases)


def _cpu_sampler(phases: Phases) -> Sampler:
    calls = len(phases.operands)

    def sample() -> Sample:
        start = time.perf_counter()
        outputs = phases.forward()
        middle = time.perf_counter()
        phases.backward(outputs)
        end = time.perf_counter()
        return Sample((middle - start) / calls, (end - middle) / calls)

    return sample


def _eager_sampler(phases: Phases) -> Sampler:
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def sample() -> Sample:
        start.record()
        outputs = phases.forward()
        middle.record()
        phases.backward(outputs)
        end.record()
        return _elapsed(start, middle, end, len(phases.operands))

    return sample


def _graph_sampler(phases: Phases, pool: Any) -> Sampler:
    # Warm-up on a side stream, as capture asks for: compilation and autotuning must not be captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            phases.backward(phases.forward())
    torch.cuda.current_stream().wait_stream(stream)

    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, pool=pool):
        outputs = phases.forward()
    with torch.cuda.graph(backward, pool=pool):
        phases.backward(outputs)
    del outputs
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def sample() -> Sample:
        start.record()
        forward.replay()
        middle.record()
        backward.replay()
        end.record()
        return _elapsed(start, middle, end, len(phases.operands))

    return sample


def _elapsed(start: torch.cuda.Event, middle: torch.cuda.Event, end: torch.cuda.Event, calls: int) -> Sample:
    end.synchronize()
    return Sample(start.elapsed_time(middle) / calls / 1e3, middle.elapsed_time(end) / calls / 1e3)


def saved_bytes(layer: Layer, operands: Operands) -> int:
    """What one forward keeps for backward, parameters and target aside."""
    parameters = {t.untyped_storage().data_ptr() for t in (operands.weight, operands.target, operands.bias)}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(operands)
    return sum(saved.values())
