"""Everything that is measured about one case: all its layers side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import clocks
from benchmarks.common.interleave import interleave_for
from benchmarks.common.memory import saved_bytes
from benchmarks.common.rows import Row, attempt, guarded

from .agreement import SEED, Expected
from .cases import Case, Operands
from .layers import Call, Layer
from .roofline import Ceilings, work

FEWEST_ROUNDS, MOST_ROUNDS = 11, 101
MODES = ("forward", "backward", "both")


def measure(
    case: Case, layers: Sequence[Layer], device: torch.device, seconds: float, launch: str, ceilings: Ceilings
) -> list[Row]:
    """Check this package's layers against the reference, then sample all layers in turn for ``seconds``.

    Whatever a layer raises is that layer's result; the others are measured all the same.
    """
    torch.compiler.reset()  # else torch.compile stops after the eighth shape of one function
    torch.manual_seed(SEED)
    generator = torch.Generator(device).manual_seed(SEED)
    operands = [Operands.random(case, device, generator)]
    rows = {layer.name: _rows(case, layer) for layer in layers}

    ours = [layer for layer in layers if layer.ours]
    for mix in dict.fromkeys(layer.mix for layer in ours):
        expected = Expected(operands[0], mix)  # for all that compute the same: it is in float64, and large
        for layer in ours:
            if layer.mix == mix:
                with attempt(rows[layer.name]):
                    verdict = expected.check(layer)
                    for row in rows[layer.name]:
                        row.judge(verdict)
        del expected

    calls = operand_sets(case, device)
    operands += [Operands.random(case, device, generator) for _ in range(calls - 1)]
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and launch == "graph" else None
    samplers: dict[str, Callable[[], tuple[float, ...] | None]] = {}
    for layer in layers:
        if rows[layer.name][0].failure is None:
            with attempt(rows[layer.name]):
                phases = Phases(layer.make(), operands, layer.has_backward)
                for row in rows[layer.name]:
                    row.facts["saved_bytes"] = phases.saved_bytes() if layer.has_backward else None
                samplers[layer.name] = guarded(rows[layer.name], phases.sampler(device, pool))
    samples = interleave_for(samplers, seconds, FEWEST_ROUNDS, MOST_ROUNDS)
    for layer in layers:
        for row in rows[layer.name]:
            if row.failure:
                continue
            row.samples = [row_seconds(row.mode, sample) for sample in samples[layer.name]]
            need = work(case, layer, row.mode)
            row.facts["gflop_per_second"] = need.flops / row.median / 1e9
            row.facts["gbyte_per_second"] = need.bytes / row.median / 1e9
            row.facts["roofline_share"] = ceilings.seconds(need, case.dtype_name) / row.median
    return [row for found in rows.values() for row in found]


def row_seconds(mode: str, sample: Sequence[float]) -> float:
    return sum(sample) if mode == "both" else sample[MODES.index(mode)]


def _rows(case: Case, layer: Layer) -> list[Row]:
    modes = MODES if layer.has_backward else MODES[:1]
    return [Row(case.name, layer.name, mode, required=layer.ours, facts=layer.facts()) for mode in modes]


class Phases:
    """Forward of every operand set, then backward of every one, as a network does.

    On a GPU the operand sets are distinct and together larger than the L2 cache, so no call finds its weight there. By
    default each phase is a CUDA graph: it shows the device's time where an eager call of a small layer shows Python's.
    """

    def __init__(self, call: Call, operands: Sequence[Operands], has_backward: bool) -> None:
        self.call, self.operands, self.has_backward = call, operands, has_backward
        self._outputs: list[Tensor] = []

    def forward(self) -> None:
        self._outputs = [self.call(o) for o in self.operands]

    def backward(self) -> None:
        outputs, self._outputs = self._outputs, []
        if self.has_backward:
            for y, o in zip(outputs, self.operands, strict=True):
                torch.autograd.grad(y, o.differentiable, o.grad)

    def both(self) -> None:
        self.forward()
        self.backward()

    def saved_bytes(self) -> int:
        """Count what one forward keeps for backward; parameters and target aside."""
        o = self.operands[0]
        return saved_bytes(lambda: self.call(o), (o.weight, o.target, o.bias))

    def sampler(self, device: torch.device, pool: Any) -> clocks.Sampler:
        """Time both phases: as CUDA graphs in this ``pool``, or eagerly if there is none."""
        phases: tuple[clocks.Phase, ...] = (self.forward, self.backward)
        if pool is not None:
            clocks.warm_up(self.both)  # compilation and autotuning must not be captured
            phases = tuple(clocks.captured(phase, pool) for phase in phases)
        return clocks.sampler(phases, device, len(self.operands))


def operand_sets(case: Case, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(device)
    beyond_cache = math.ceil(3 * properties.L2_cache_size / case.operand_bytes)
    # Besides its operands a call keeps its output and what it saves for backward: no more than twice the operands.
    fitting = torch.cuda.mem_get_info(device)[0] // (4 * case.operand_bytes)
    return max(1, min(64, max(8, beyond_cache), fitting))
