"""Measures a training step on this machine: ``python -m benchmarks.step``."""

from __future__ import annotations

import os

# Read when torch is loaded. Large CPU tensors on huge pages: the gradient of the embedding alone is 47 MB, freshly
# allocated in every step of every variant, and page faults would be a noise of 10 % on the whole step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import re
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.finetune.environment import environment
from benchmarks.finetune.errors import FinetuneError
from mixout_kernels import backends

from .measurement import measure
from .report import Report
from .variants import Variant, all_variants
from .workload import WORKLOADS


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    full, tiny = {"cpu": ("minilm", "tiny"), "cuda": ("bert-large", "tiny-gpu")}[options.device]
    name = tiny if options.quick else full
    rounds = options.rounds or (5 if options.quick else 30)
    variants = _variants(options)
    # Of the eager steps that are captured too: there is nothing to impair in the fused AdamW.
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    try:
        with_memory = not (options.quick or options.no_memory)
        found = measure(name, variants, rounds, with_memory, lambda text: print(text, file=sys.stderr))
    except FinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    workload = WORKLOADS[name]
    report = Report(workload, _machine(workload.device), found)
    print(report.markdown(), "", *report.write(options.output), sep="\n")
    return 0 if all(measurement.matches_reference is not False for measurement in found) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("results/step"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="samples of each variant (30)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: a smoke test")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory on a CPU out")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these, and dropout: 'sampler|plain'")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    return options


def _variants(options: argparse.Namespace) -> list[Variant]:
    chosen = {variant for variant in all_variants() if _wanted(variant, options)}
    chosen |= {variant.eager for variant in chosen if variant.mode == "graph"}
    return [variant for variant in all_variants() if variant in chosen]


def _wanted(variant: Variant, options: argparse.Namespace) -> bool:
    on_cpu = options.device == "cpu"
    if not (variant.kind == "dropout" or re.search(options.only, variant.name)):
        return False
    if variant.mode == "compiled":
        return not (options.no_compile or options.quick) and (variant.kind == "plain" or not on_cpu)
    if variant.kind in ("staged", "premix"):
        return on_cpu
    if variant.kind == "triton":  # without the CUDA kernels "sampler" is Triton
        return not on_cpu and backends.load("cuda").unavailable_reason() is None
    return not (on_cpu and variant.mode == "graph")


def _machine(device: str) -> dict[str, str | int]:
    machine = {name: value for name, value in environment().items() if name != "system"}
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), **machine}
    switches = {name: os.environ[name] for name in ("THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY") if name in os.environ}
    return {**machine, **switches}


if __name__ == "__main__":
    sys.exit(main())
