"""Measure GradDrop, Child-Tuning, R3F and the Fisher information on this machine, each beside its published form."""

from __future__ import annotations

import os

# As in benchmarks.step: page faults of the embedding's gradient would be a noise of 10 %.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import machine
from benchmarks.common.arguments import count
from benchmarks.common.errors import CommandError
from benchmarks.common.report import write
from benchmarks.common.rows import Run
from benchmarks.step.workload import QUICK, WORKLOADS

from .measurement import measure
from .report import draw, markdown
from .variants import fisher_passes, steps


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    workload = WORKLOADS[QUICK["cpu"] if options.quick else "minilm"]
    chosen = [step for number, step in enumerate(steps()) if number < 2 or options.only.search(step.name)]
    passes = fisher_passes()
    rounds = options.rounds or (3 if options.quick else 20)
    try:
        rows = measure(workload, chosen, passes, rounds, lambda text: print(text, file=sys.stderr))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run = Run(machine.describe(), chosen[0].name, rows)
    by_name = {step.name: step for step in chosen}
    text = markdown(run, workload, by_name, {one.name: one for one in passes})
    print(text)
    return write(run, options.output, "tiny" if options.quick else "minilm", text, draw(run, workload, by_name))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/neighbours"), help="default: %(default)s")
    parser.add_argument("--rounds", type=count, help="samples of each variant (20)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: a smoke test")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="only these, and the baselines")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
