"""What a training step costs the host of a GPU machine, without a GPU: milliseconds, launches, allocations, memory.

    make host-time                                  builds what it needs, and runs
    python -m tools.stand_in --memory-gib 1024 python -m tools.host_time

Beside the stand-in of tools/stand_in, whose head says what this cannot show. A step whose host needs longer than its
GPU is as slow as the host, so that is what eager mode has to keep short.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import machine
from benchmarks.common.interleave import interleave
from benchmarks.common.report import failure_lines, machine_line, ratio_cell, table
from benchmarks.common.rows import Row, Run, attempt, guarded
from benchmarks.step.training import WARMUP_STEPS, Training
from benchmarks.step.variants import Variant, all_variants
from benchmarks.step.workload import WORKLOADS, Workload
from tools.stand_in import StandIn, difference, launch_us

PHASES = ("forward", "backward", "optimizer")  # zero_grad is of the forward
STEP = "step"


def main(arguments: Sequence[str] | None = None) -> int:
    names = [name for name, workload in WORKLOADS.items() if workload.device == "cuda"]
    parser = argparse.ArgumentParser(prog="python -m tools.host_time", description=__doc__)
    parser.add_argument("--workload", choices=names, default="bert-large", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each variant (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/host-time"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        stand_in = StandIn()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    workload = WORKLOADS[options.workload]
    rows = measure(workload, eager_variants(workload), options.rounds, stand_in)
    run = Run(machine.describe(), rows[0].variant, rows)
    text = markdown(run, workload, launch_us())
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{workload.name}.md").write_text(text)
    (options.output / f"{workload.name}.json").write_text(json.dumps(report(run, launch_us()), indent=1) + "\n")
    return 1 if run.failures() else 0


def eager_variants(workload: Workload) -> list[Variant]:
    """List the steps of bench-step that the stand-in can run: eager ones, without Triton.

    On a GPU a sampler mixes ahead by itself, so that premix is no step of its own there.
    """
    variants = all_variants((workload.precision,), ("sdpa",))
    return [v for v in variants if v.mode == "eager" and v.kind not in ("triton", "premix")]


def measure(workload: Workload, variants: Sequence[Variant], rounds: int, stand_in: StandIn) -> list[Row]:
    """Take the steps of all variants in turn: four rows of each, for the phases and for their sum."""
    workload = replace(workload, make=_on_device(workload.make))
    rows = {
        variant: [Row(workload.name, variant.name, mode, facts=variant.facts()) for mode in (*PHASES, STEP)]
        for variant in variants
    }
    samplers: dict[str, Callable[[], tuple[float, ...] | None]] = {}
    for variant, own in rows.items():
        print(f"{variant.name}: warm-up", file=sys.stderr)
        gc.collect()
        with attempt(own):
            before = torch.cuda.memory_allocated()
            training = Training(workload, variant)
            training.steps(WARMUP_STEPS)
            facts = _facts_of_a_step(training, stand_in)
            for row in own:
                row.facts |= {**facts, "peak_bytes": facts["peak_bytes"] - before}
            samplers[variant.name] = guarded(own, _sampler(training))
    gc.collect()
    samples = interleave(samplers, rounds)
    for variant, own in rows.items():
        if not own[0].failure:
            for row, seconds in zip(own, zip(*samples[variant.name], strict=True), strict=True):
                row.samples = seconds
    return [row for own in rows.values() for row in own]


def _on_device(make: Callable[[str], nn.Module]) -> Callable[[str], nn.Module]:
    """Make a model where it will be, and none of its random weights on the host, where that takes seconds."""

    def made(attention: str) -> nn.Module:
        with torch.device("cuda"):
            return make(attention)

    return made


def _facts_of_a_step(training: Training, stand_in: StandIn) -> dict[str, int]:
    torch.cuda.reset_peak_memory_stats()
    counted, kernels = stand_in.counters(), stand_in.kernels()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    training.step()
    facts = {name: stand_in.counters()[name] - count for name, count in counted.items()}
    facts["device_allocations"] = facts.pop("allocations")  # cudaMalloc: none once training has begun
    launched = difference(stand_in.kernels(), kernels)
    facts["own_kernels"] = sum(count for name, count in launched.items() if "mixout" in name)
    facts["allocations"] = torch.cuda.memory_stats()["allocation.all.allocated"] - allocations
    return {**facts, "peak_bytes": torch.cuda.max_memory_allocated()}


def _sampler(training: Training) -> Callable[[], tuple[float, ...]]:
    """Sample the seconds of each phase of a step, and of their sum: of a second step in a row, as training has it.

    In the first the caches hold what the variant before has left there. The seconds are CPU time of this process, which
    has one thread at work at a time: what else runs on the machine does not count.
    """

    def step() -> tuple[float, ...]:
        times = [time.process_time()]
        with training.variant.kernels():
            training.optimizer.zero_grad()
            loss = training.loss()
            times.append(time.process_time())
            loss.backward()
            times.append(time.process_time())
            training.optimizer.step()
            times.append(time.process_time())
        return (*(end - start for start, end in pairwise(times)), times[-1] - times[0])

    def sample() -> tuple[float, ...]:
        step()
        return step()

    return sample


def _launches(row: Row) -> int:
    return sum(int(row.facts[name]) for name in ("kernels", "gemms", "copies", "memsets"))


def markdown(run: Run, workload: Workload, launch: float) -> str:
    heads = ["step", *PHASES, "ms", "quartiles", "x dropout", "of it launches"]
    heads += ["kernels", "of them ours", "GEMMs", "copies, memsets", "allocations", "peak MiB"]
    lines = []
    for step in (row for row in run.rows if row.mode == STEP and row.samples):
        phases = [run.find(step.case, step.variant, phase) for phase in PHASES]
        low, high = step.quartiles
        facts = step.facts
        lines.append(
            [
                step.variant,
                *(f"{row.median * 1e3:.1f}" for row in phases if row),
                f"{step.median * 1e3:.1f}",
                f"{low * 1e3:.1f} - {high * 1e3:.1f}",
                ratio_cell(run, step),
                f"{_launches(step) * launch / 1e3:.1f}",
                *(str(facts[name]) for name in ("kernels", "own_kernels", "gemms")),
                str(int(facts["copies"]) + int(facts["memsets"])),
                str(facts["allocations"]),
                f"{int(facts['peak_bytes']) / 2**20:.0f}",
            ]
        )
    sections = [f"# What a step costs the host: {workload.description}"]
    sections += [
        "**No GPU has run this.** It is the time of the host alone, beside a stand-in for the CUDA runtime whose "
        "launches compute nothing: what eager training would take if the GPU took no time.",
        failure_lines(run),
        table(heads, lines),
        _notes(run, launch),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _notes(run: Run, launch: float) -> str:
    rounds = max((len(row.samples) for row in run.rows), default=0)
    notes = [
        f"Milliseconds of CPU time, medians of {rounds} rounds; every round takes two steps of each variant, in random "
        "order, and times the second. forward begins with zero_grad; the sampler's part is in the optimizer's.",
        f'A kernel, a GEMM, a copy and a memset cost {launch:g} us each, which is the share "of it launches". '
        "The real driver and cuBLAS cost more or less than that.",
        "allocations: of torch's caching allocator. Peak: torch.cuda.max_memory_allocated above what was allocated "
        "before this variant; gradients and Adam's moments included.",
        "Not run here: CUDA graphs, whose replay is one launch; torch.compile and Triton, whose code the stand-in "
        "cannot load; cuDNN's attention, in whose place torch's own flash attention is launched.",
        "Nothing is waited for: a step that reads a value from the GPU takes longer on one.",
    ]
    return "\n".join(f"- {note}" for note in [*notes, machine_line(run.machine)])


def report(run: Run, launch: float) -> dict[str, object]:
    """Return the run as JSON: one entry a step, its times in milliseconds."""
    steps = []
    for step in (row for row in run.rows if row.mode == STEP):
        entry: dict[str, object] = {"step": step.variant, **step.facts, "failure": step.failure}
        if step.samples:
            rows = {mode: run.find(step.case, step.variant, mode) for mode in (*PHASES, STEP)}
            entry["milliseconds"] = {mode: round(row.median * 1e3, 4) for mode, row in rows.items() if row}
            entry["quartiles"] = [round(seconds * 1e3, 4) for seconds in step.quartiles]
            entry["ratio"] = run.ratio(step)
            entry["rounds"] = len(step.samples)
        steps.append(entry)
    return {"machine": run.machine, "launch_us": launch, "steps": steps}


if __name__ == "__main__":
    sys.exit(main())
