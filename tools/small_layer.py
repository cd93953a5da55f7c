"""What a layer costs the host: forward and backward of one too small to compute anything, over nn.Linear's.

    python -m tools.small_layer [--shape 2x4x4] [--rounds 60] [--calls 200]

Prints a table in Markdown: microseconds a call, and ratios of medians. In each round the layers take turns, with so
many calls each; rows x in x out, float32, p = 0.7, one decision per input feature. It is the CPU time of one thread, so
that a busy machine disturbs it little.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

import mixout_kernels as mk
from benchmarks.common.interleave import interleave

P = 0.7


def layers(inputs: int, outputs: int) -> dict[str, nn.Module]:
    def with_sampler(premix: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(inputs, outputs))
        mk.apply_mixout(model, p=P, exclude=())
        mk.MixSampler(model, premix=premix)
        return model[0]

    return {
        "nn.Linear": nn.Linear(inputs, outputs),
        "Dropout(0.1) + nn.Linear": nn.Sequential(nn.Dropout(0.1), nn.Linear(inputs, outputs)),
        "MixLinear": mk.MixLinear.from_linear(nn.Linear(inputs, outputs), p=P),
        "MixLinear, sampler": with_sampler(premix=False),
        "MixLinear, sampler, premix=True": with_sampler(premix=True),
    }


def sampler(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, calls: int) -> Callable[[], tuple[float, float]]:
    """Sample the seconds of a forward, and of a forward with its backward."""

    def sample() -> tuple[float, float]:
        begin = time.thread_time()
        for _ in range(calls):
            layer(x)
        middle = time.thread_time()
        for _ in range(calls):
            layer(x).backward(grad)
        return (middle - begin) / calls, (time.thread_time() - middle) / calls

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2x4x4", help="rows x in x out (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    rows, inputs, outputs = map(int, arguments.shape.split("x"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="MixSampler: .* no step of a torch.optim optimizer")
    x, grad = torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)
    found = interleave(
        {name: sampler(layer, x, grad, arguments.calls) for name, layer in layers(inputs, outputs).items()},
        arguments.rounds,
    )
    medians = {
        name: [statistics.median(times) for times in zip(*samples, strict=True)] for name, samples in found.items()
    }
    plain = medians["nn.Linear"]
    print(f"| {arguments.shape} | forward, us | / nn.Linear | forward + backward, us | / nn.Linear |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (forward, both) in medians.items():
        cells = f"{forward * 1e6:.1f} | {forward / plain[0]:.2f} | {both * 1e6:.1f} | {both / plain[1]:.2f}"
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
