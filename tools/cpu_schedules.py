"""Where "auto" on the CPU should change from fused to staged: both schedules over F.linear, for each number of rows.

    python -m tools.cpu_schedules [--rows 8 64 512] [--features 768x768] [--threads 1]
                                  [--dtype float32]

Prints a table in Markdown: forward and backward of a layer with p = 0.7 and p = 0.9, one decision per input feature,
and with p = 0.7 and one per entry; then the layer whose product reads an operand (GradDrop, or Phi mixed ahead). Each
cell has fused and staged. A figure is the first quartile of rounds in which the candidates take turns, other data
filling L2 before each. With one thread it is CPU time, so that a busy machine disturbs it little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mixout_kernels.backends import cpu
from mixout_kernels.backends.contract import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw, strides_of

COLUMNS = [("p = 0.7", 0.7, "neuron", False), ("p = 0.9", 0.9, "neuron", False), ("per entry", 0.7, "weight", False)]
COLUMNS += [("operand", 0.7, "neuron", True)]
ALL = (True, True, True)


def layer(
    rows: int, inputs: int, outputs: int, p: float, kind: str, given: bool, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Forward and backward of F.linear and of both schedules."""
    sizes = (rows, inputs), (rows, outputs), (outputs,), (outputs, inputs), (outputs, inputs)
    x, g, bias, w, u = (torch.randn(size).to(dtype) for size in sizes)
    draw = Draw(torch.tensor([3]), p, strides_of(kind, w.shape))
    phi, gradient = MixedWeight(w, u, w if given else None, draw), WeightGradient(draw, draw.scale, None)

    def plain() -> object:
        return F.linear(x, w, bias), g @ w, g.t() @ x, g.sum(0)

    def mixed(schedule: str) -> object:
        y, saved = cpu.mix_linear(x, phi, bias, gradient, schedule)
        return y, cpu.mix_linear_backward(g, saved if draw.by_column else x, phi, gradient, ALL, schedule)

    return {"linear": plain, "fused": lambda: mixed("fused"), "staged": lambda: mixed("staged")}


def seconds(candidates: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    others = torch.empty(4 << 20)  # 16 MB: what a training step reads in between
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + 1
    while time.perf_counter() < end or len(times["linear"]) < 12:
        for name, run in candidates.items():
            others.fill_(1)
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.quantiles(found, n=4)[0] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--features", nargs="+", default=["384x384", "768x768", "768x3072", "3072x768"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter

    print(f"| rows x in x out | F.linear, ms | {' | '.join(name for name, *_ in COLUMNS)} |")
    print("| --- | ---: |" + " ---: |" * len(COLUMNS))
    for features in arguments.features:
        inputs, outputs = map(int, features.split("x"))
        for rows in arguments.rows:
            found = [seconds(layer(rows, inputs, outputs, *column, dtype), clock) for _, *column in COLUMNS]
            cells = [", ".join(f"{t[name] / t['linear']:.2f}" for name in ("fused", "staged")) for t in found]
            plain = min(times["linear"] for times in found) * 1e3
            print(f"| {rows} x {inputs} x {outputs} | {plain:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
