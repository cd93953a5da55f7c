"""Measure linear layers with mixout, and the layers that they replace, on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.common.report import write
from benchmarks.common.rows import Run

from .cases import cases_for
from .layers import LINEAR, layers_for
from .measurement import measure
from .plot import draw
from .roofline import measure_ceilings
from .table import markdown


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device(options.device)
    cases = [case for case in cases_for(device.type, options.quick, options.full) if options.shapes.search(case.name)]
    seconds = options.seconds or (2.0 if options.quick else 25.0 if device.type == "cpu" else 4.0)
    ceilings = measure_ceilings(device, {case.dtype_name for case in cases})
    rows = []
    for case in cases:
        layers = [v for v in layers_for(case, device.type) if v.name == LINEAR or options.only.search(v.name)]
        print(f"{case.name}: {len(layers)} layers", file=sys.stderr)
        rows += measure(case, layers, device, seconds, options.launch, ceilings)
    run = Run({**machine.describe(device.type), "ceilings": str(ceilings)}, LINEAR, rows)
    return write(run, options.output, _slug(run, device.type), markdown(run, device.type), draw(run, device.type))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one shape and few rounds: a smoke test")
    parser.add_argument("--full", action="store_true", help="on a GPU: all 62 shapes, which takes an hour")
    parser.add_argument("--seconds", type=float, help="of interleaved rounds per shape (25 on a CPU, 4 on a GPU)")
    parser.add_argument("--launch", choices=("graph", "eager"), default="graph", help="on a GPU; default: %(default)s")
    parser.add_argument(
        "--shapes", type=re.compile, default="", metavar="REGEX", help="only these, such as 2048x768x768-fp32"
    )
    parser.add_argument(
        "--only",
        type=re.compile,
        default="",
        metavar="REGEX",
        help="only these, and nn.Linear: 'mixout|dropout'",
    )
    return parser.parse_args(arguments)


def _slug(run: Run, device: str) -> str:
    """Name the files of the result: nvidia-h200, amd-epyc-2-threads."""
    name = f"{run.machine['device']} {'' if device == 'cuda' else '{threads} threads'.format(**run.machine)}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", name).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
