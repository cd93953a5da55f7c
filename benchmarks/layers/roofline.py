"""The two sides of the roofline: what a layer needs at least, and how fast this machine can be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mixout_kernels.draws import shares_columns, strides_of

from .cases import DTYPES, Case
from .layers import Layer


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes that the operation needs, whoever computes it: one pass over each tensor."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def work(case: Case, layer: Layer, mode: str) -> Work:
    m, k, n = case.rows, case.in_features, case.out_features
    mix = layer.mix
    # dw is zero outside the columns that a neuron mask keeps; where the target is zero they are all the layer has.
    by_column = mix is not None and shares_columns(strides_of(mix.mask, (n, k)))
    mixed = (1 - mix.p) * k if by_column else k
    kept = (1 - mix.grad_p) * mixed if by_column else k
    used = mixed if mix and mix.target == "zero" else k
    weights = 2 if mix and mix.target == "pretrained" else 1
    size = case.dtype.itemsize
    forward = Work(2.0 * m * n * used, size * (m * used + weights * n * used + n + m * n))
    backward = Work(2.0 * m * n * (used + kept), size * (m * n + m * kept + weights * n * used + m * k + n * k + n))
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


@dataclass(frozen=True)
class Ceilings:
    """The best rates of this machine, measured by the run itself before anything else."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype name

    def seconds(self, need: Work, dtype_name: str) -> float:
        """The larger of the times at the two ceilings."""
        return max(need.flops / self.flops_per_second[dtype_name], need.bytes / self.bytes_per_second)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in self.flops_per_second.items())
        return f"copy {self.bytes_per_second / 1e9:.4g} GB/s; matmul {rates}"


def measure_ceilings(device: torch.device, dtype_names: set[str]) -> Ceilings:
    """Take the best copy bandwidth (a read and a write) and GEMM throughput of some tries: ceilings, not averages."""
    on_cpu = device.type == "cpu"
    source, copy = (torch.ones(2**26 if on_cpu else 2**28, device=device) for _ in range(2))
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: copy.copy_(source), device)
    size = 2048 if on_cpu else 8192
    flops = {}
    for name in sorted(dtype_names):
        a, b, out = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(3))
        products: list[Callable[[], object]] = [partial(torch.mm, a, b, out=out)]
        if on_cpu and torch.backends.mkldnn.is_available():
            # What torch.compile may take. torch.mm's BLAS leaves half of an AMD CPU's float32 units idle.
            products.append(partial(torch.ops.mkldnn._linear_pointwise.default, a, b, None, "none", [], ""))
        flops[name] = 2 * size**3 / min(_best_seconds(product, device) for product in products)
    return Ceilings(bandwidth, flops)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    calls = 1 if device.type == "cpu" else 10
    best = float("inf")
    for _ in range(9):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best
