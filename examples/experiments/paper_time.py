"""Time (supplement E): the paper's own workload on a CPU, dropout against mixout.

BERT-large (24 x 1024, random weights), batches of 32 sequences of 128 tokens, AdamW, float32. There is one model, whose
regularisation is changed between steps: two would not fit into the memory of an ordinary machine. All ways take their
steps in turn, each time another one first, so that other load on the machine weighs on all alike; each start of the
command takes one step that is not measured, which makes Adam's state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import mixout_kernels as mk
from benchmarks.common import machine
from benchmarks.common.report import BLUES, GREY, ORANGE, table, tidy
from benchmarks.step.variants import Variant
from benchmarks.step.workload import WORKLOADS, Workload

from .runs import Run, finished, run_all

ROUNDS, QUICK_ROUNDS = 5, 2
BERT_LARGE, TINY = replace(WORKLOADS["bert-large"], device="cpu"), WORKLOADS["tiny"]
BASELINE = Variant("dropout")
COMPARED = (
    BASELINE,
    Variant("plain", 0.7),
    Variant("staged", 0.7),
    *(Variant("layers", p) for p in (0.7, 0.8, 0.9)),
)


class OneModel:
    """A model in training, whose regularisation is another one in each step."""

    def __init__(self, workload: Workload) -> None:
        self.model, self.batch = workload.model(), workload.batch()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)

    def seconds(self, variant: Variant) -> float:
        """The time of a step: forward, backward and optimizer. To change the model is not part of it."""
        with regularised(self.model, variant), variant.kernels():
            start = time.perf_counter()
            self.model(**self.batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return time.perf_counter() - start


@contextmanager
def regularised(model: nn.Module, variant: Variant) -> Iterator[None]:
    """The model under ``variant``, then as it was: the same modules with the same Parameters and dropout rates."""
    before = dict(model.named_modules())
    variant.prepare(model)
    try:
        yield
    finally:
        for name, module in list(model.named_modules()):
            if name in before and module is not before[name]:  # the plain formula has modules of its own
                model.set_submodule(name, before[name])
        if variant.kind != "dropout":
            mk.remove_mixout(model)


def in_turn(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """The settings of every step; each round starts with another variant."""
    found = machine.describe()
    where = {"workload": workload.name, "device": found["device"], "threads": found["threads"]}
    return [
        {**where, "kind": variant.kind, "p": variant.p, "round": number}
        for number in range(rounds)
        for variant in COMPARED[number % len(COMPARED) :] + COMPARED[: number % len(COMPARED)]
    ]


def results(output: Path, *, quick: bool, report_only: bool) -> list[Run]:
    """Measure what is not measured yet and return all steps. Each is kept as soon as it is finished."""
    chosen, path = TINY if quick else BERT_LARGE, output / "time.jsonl"
    training: OneModel | None = None  # made when the first step is to be taken

    def step(kind: Any, p: float, **_: Any) -> Mapping[str, Any]:
        nonlocal training
        if training is None:
            training = OneModel(chosen)
            training.seconds(COMPARED[-1])
        return {"seconds": float(f"{training.seconds(Variant(kind, p)):.4g}")}

    if not report_only:
        run_all(path, in_turn(chosen, QUICK_ROUNDS if quick else ROUNDS), step)
    return [run for run in finished(path) if run["workload"] == chosen.name]


Seconds = dict[Variant, list[float]]


def whole_rounds(runs: Sequence[Run]) -> dict[str, Seconds]:
    """By machine, the seconds of each variant in the rounds that all variants have finished."""
    rounds: dict[str, dict[int, dict[Variant, float]]] = {}
    for run in runs:
        times = rounds.setdefault(f"{run['device']}, {run['threads']} threads", {}).setdefault(run["round"], {})
        times[Variant(run["kind"], run["p"])] = run["seconds"]
    found = {}
    for where, of in rounds.items():
        whole = [times for _, times in sorted(of.items()) if len(times) == len(COMPARED)]
        if whole:
            found[where] = {variant: [times[variant] for times in whole] for variant in COMPARED}
    return found


def page(runs: Sequence[Run]) -> str:
    chosen = TINY if runs and runs[0]["workload"] == TINY.name else BERT_LARGE
    said = (
        f"{chosen.title}, batches of {chosen.rows} x {chosen.tokens} tokens, fused AdamW, float32. All steps in turn, "
        "on one model whose regularisation is changed between them. Ratios are of medians; the last column has the "
        "smallest and the largest ratio within a round. The paper reports 1.325 for mixout."
    )
    parts = [part for where, times in whole_rounds(runs).items() for part in (_machine(where, times), "")]
    parts = [*parts, "![seconds of a training step](time.png)"] if parts else ["No round is finished yet."]
    return "\n".join(["# Time (supplement E)", "", said, "", *parts, ""])


def _machine(where: str, times: Seconds) -> str:
    heads = ["step", "seconds (median)", "smallest to largest", "dropout = 1", "within a round"]
    rows = [_row(variant, of, times[BASELINE]) for variant, of in times.items()]
    return "\n".join([f"{where}, {len(times[BASELINE])} rounds:", "", table(heads, rows)])


def _row(variant: Variant, seconds: Sequence[float], baseline: Sequence[float]) -> list[str]:
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    return [
        variant.name,
        f"{statistics.median(seconds):.3g}",
        f"{min(seconds):.3g} to {max(seconds):.3g}",
        f"{statistics.median(seconds) / statistics.median(baseline):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Median seconds of a step and a dot for each round, a panel for each machine; nothing before a whole round."""
    found = whole_rounds(runs)
    if not found:
        return
    figure = Figure(figsize=(7.5, 2.8 * len(found)), layout="constrained", dpi=130)
    panels = figure.subplots(len(found), squeeze=False)[:, 0]
    for panel, (where, times) in zip(panels, found.items(), strict=True):
        for place, (variant, seconds) in enumerate(times.items()):
            colour = {"dropout": GREY, "plain": ORANGE, "staged": BLUES[1]}.get(variant.kind, BLUES[0])
            panel.barh(place, statistics.median(seconds), height=0.6, color=colour, alpha=0.6)
            panel.scatter(seconds, [place] * len(seconds), color=colour, s=12)
        panel.set_yticks(range(len(times)), [variant.name for variant in times])
        panel.invert_yaxis()
        panel.set_xlabel("seconds a step")
        panel.set_title(where, fontsize=9)
        tidy(panel)
    figure.savefig(path, format="png")
