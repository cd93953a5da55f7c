"""Measure whole training steps of a transformer on this machine: dropout, mixout as a formula, mixout_kernels."""

from __future__ import annotations

import os

# Read when torch is loaded. Large CPU tensors on huge pages: the gradient of the embedding alone is 47 MB, freshly
# allocated in every step of every variant, and page faults would be a noise of 10 % on the whole step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks.common import machine
from benchmarks.common.arguments import count
from benchmarks.common.errors import CommandError
from benchmarks.common.report import write
from benchmarks.common.rows import Run
from mixout_kernels import backends

from .measurement import measure
from .report import draw, markdown
from .variants import Precision, Variant, all_variants
from .workload import DEFAULTS, QUICK, WORKLOADS, Workload


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Of the eager steps that are captured too: there is nothing to impair in the fused AdamW.
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    statuses = []
    for name in options.workloads:
        workload = WORKLOADS[name]
        variants = choose(workload, options)
        rounds = options.rounds or (5 if options.quick else 30)
        with_memory = not (options.quick or options.no_memory)
        try:
            rows = measure(workload, variants, rounds, with_memory, lambda text: print(text, file=sys.stderr))
        except CommandError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        run = Run(_machine(workload.device), variants[0].name, rows)
        text = markdown(run, workload)
        print(text)
        statuses.append(write(run, options.output, name, text, draw(run, workload)))
    return max(statuses)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("results/step"), help="default: %(default)s")
    parser.add_argument("--rounds", type=count, help="samples of each variant (30)")
    parser.add_argument("--threads", type=count, help="on a CPU; one: measured in CPU time, on a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: a smoke test")
    parser.add_argument("--full", action="store_true", help="every variant, precision, attention and batch")
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=f"of {', '.join(WORKLOADS)} (minilm)"
    )
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), help="(the workload's own)")
    parser.add_argument("--attention", nargs="+", choices=("sdpa", "eager"), help="of transformers (sdpa)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory on a CPU out")
    parser.add_argument(
        "--only", type=re.compile, default="", metavar="REGEX", help="only these, and dropout: 'sampler|plain'"
    )
    options = parser.parse_args(arguments)
    chosen = (QUICK[options.device],) if options.quick else DEFAULTS[options.device][: None if options.full else 1]
    options.workloads = options.workloads or chosen
    for name in options.workloads:
        if WORKLOADS[name].device != options.device:
            parser.error(f"--workloads: {name} is for --device {WORKLOADS[name].device}")
    return options


def choose(workload: Workload, options: argparse.Namespace) -> list[Variant]:
    """Choose the variants to measure: the eager step with dropout first, and those that ratios are taken to."""
    own = workload.precision
    precisions = options.precision or ((own, *{"float32", "bfloat16"} - {own}) if options.full else (own,))
    attentions = options.attention or (("sdpa", "eager") if options.full else ("sdpa",))
    variants = all_variants(tuple(precisions), tuple(attentions))
    chosen = {variants[0], *(variant for variant in variants if _wanted(variant, options))}
    chosen |= {variant.trained for variant in chosen} | {variant.dropout_alike for variant in chosen}
    return [variant for variant in variants if variant in chosen]


def _wanted(variant: Variant, options: argparse.Namespace) -> bool:
    on_cpu = options.device == "cpu"
    if not options.only.search(variant.name):
        return False
    if variant.mode == "compiled":
        return not (options.no_compile or options.quick) and (variant.kind != "sampler" or not on_cpu)
    if variant.kind == "premix":
        return on_cpu and options.full
    if variant.kind == "staged":
        return on_cpu
    if variant.kind == "triton":  # without the CUDA kernels "sampler" is Triton
        return not on_cpu and backends.load("cuda").unavailable_reason() is None
    return not (on_cpu and variant.mode == "graph")


def _machine(device: str) -> dict[str, str | int]:
    switches = {name: os.environ[name] for name in ("THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY") if name in os.environ}
    return {**machine.describe(device), **({} if device == "cuda" else switches)}


if __name__ == "__main__":
    sys.exit(main())
