"""The ratios this project sets itself, and whether a run reaches them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.rows import Row, Run

from .layers import DROPOUT, LINEAR

ROOFLINE = "roofline"  # a baseline that is not a layer: the time at the measured ceilings


@dataclass(frozen=True)
class Target:
    case: str  # empty: the worst of all cases
    variant: str
    baseline: str
    limit: float
    mode: str = "both"


_CPU = (
    Target("2048x768x768-fp32", "mixout-neuron-p0.9", LINEAR, 0.72),
    Target("4096x1024x1024-fp32", "mixout-neuron-p0.9", LINEAR, 0.72),
    Target("2048x768x768-fp32", "mixout-neuron-p0.7", LINEAR, 0.80),
    Target("4096x1024x1024-fp32", "mixout-neuron-p0.7", LINEAR, 0.80),
    Target("512x384x384-fp32", "mixout-neuron-p0.9", LINEAR, 0.88),
    Target("512x384x384-fp32", "mixout-neuron-p0.7", LINEAR, 0.95),
    Target("2048x768x768-fp32", "mixout-neuron-p0.9", DROPOUT, 0.60),
    Target("4096x1024x1024-fp32", "mixout-weight-p0.7", LINEAR, 1.10),
    Target("2048x768x768-fp32", "graddrop-neuron-p0.5", LINEAR, 0.50),
    Target("2048x768x768-fp32", "graddrop-neuron-p0.9", LINEAR, 0.40),
    Target("2048x768x768-fp32", "graddrop-cpu-staged-neuron-p0.5", LINEAR, 0.90),
    Target("2048x768x768-fp32", "graddrop-cpu-staged-neuron-p0.9", LINEAR, 0.75),
    Target("2048x768x768-bf16", "mixout-neuron-p0.7", LINEAR, 0.78),
    Target("2048x768x768-bf16", "mixout-neuron-p0.9", LINEAR, 0.70),
    Target("512x384x384-bf16", "mixout-neuron-p0.7", LINEAR, 0.85),
    Target("512x384x384-bf16", "mixout-neuron-p0.9", LINEAR, 0.78),
)
_GPU = (
    Target("4096x1024x1024-bf16", "mixout-neuron-p0.7", LINEAR, 0.97),
    Target("4096x1024x1024-bf16", "mixout-neuron-p0.9", LINEAR, 0.88),
    Target("8192x4096x4096-bf16", "mixout-neuron-p0.7", LINEAR, 0.85),
    Target("8192x4096x4096-bf16", "mixout-neuron-p0.9", LINEAR, 0.77),
    Target("64x4096x4096-bf16", "mixout-triton-fused-neuron-p0.9", "mixout-triton-staged-neuron-p0.9", 0.75, "forward"),
    Target("64x4096x4096-bf16", "mixout-cuda-fused-neuron-p0.9", ROOFLINE, 1.15, "forward"),
    Target("64x4096x4096-bf16", "mixout-cuda-fused-neuron-p0.9", "mixout-cuda-staged-neuron-p0.9", 1.0, "forward"),
    Target("", "mixout-neuron-p0.7", "compiled-neuron-p0.7", 0.85),
)


@dataclass(frozen=True)
class Outcome:
    target: Target
    case: str
    ratio: float | None  # None: the layer does not match the reference

    @property
    def reached(self) -> bool:
        return self.ratio is not None and self.ratio <= self.target.limit


def outcomes(run: Run, device: str) -> list[Outcome]:
    """Judge the targets whose case, layer and baseline this run has."""
    found = []
    for target in _GPU if device == "cuda" else _CPU:
        ratios: dict[str, float | None] = {}
        for case in [target.case] if target.case else run.cases():
            row = run.find(case, target.variant, target.mode)
            if row and (target.baseline == ROOFLINE or run.find(case, target.baseline, target.mode)):
                ratios[case] = _ratio(run, row, target)
        if ratios:
            # A wrong result is worse than any slow one.
            worst, ratio = max(ratios.items(), key=lambda item: float("inf") if item[1] is None else item[1])
            found.append(Outcome(target, worst, ratio))
    return found


def _ratio(run: Run, row: Row, target: Target) -> float | None:
    if target.baseline != ROOFLINE:
        return run.ratio(row, target.baseline)
    return None if row.matches is False else 1 / row.facts["roofline_share"]
