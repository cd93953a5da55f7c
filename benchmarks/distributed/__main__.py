"""Measure training steps of two ranks over networks of known speeds: plain DDP and FSDP2, and mixout's hooks on them.

It needs root, ip and tc, for network namespaces. Without them it says so, and shows the arithmetic from shapes alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.common.arguments import count
from benchmarks.common.errors import CommandError
from benchmarks.common.report import write
from benchmarks.common.rows import Run

from .measurement import measure
from .methods import ENGINES, MODELS, methods
from .network import LINKS
from .report import draw, markdown, shapes


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(1)  # what each rank has, for the head of the report
    model = "tiny" if options.quick else "bert"
    chosen = [one for one in methods() if one.engine in options.engines]
    chosen = [one for one in chosen if one.name == one.baseline or options.only.search(one.name)]
    links = [link for link in LINKS if link.name in options.links]
    rounds = options.rounds or (2 if options.quick else None)
    try:
        rows = measure(model, chosen, links, rounds, lambda text: print(text, file=sys.stderr))
    except CommandError as error:
        print(f"SKIPPED, NOTHING IS MEASURED HERE: {error}", file=sys.stderr)
        print(shapes())
        return 0
    run = Run(machine.describe(), "dropout", rows)
    text = markdown(run, MODELS[model], chosen)
    print(text)
    return write(run, options.output, model, text, draw(run, MODELS[model], chosen))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    names = [link.name for link in LINKS]
    parser.add_argument("--output", type=Path, default=Path("results/distributed"), help="default: %(default)s")
    parser.add_argument("--rounds", type=count, help="samples of each method (by link: more of a fast one)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: a smoke test")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="(both)")
    parser.add_argument("--links", nargs="+", choices=names, default=names, help=f"of {', '.join(map(repr, names))}")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="only these, and dropout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
