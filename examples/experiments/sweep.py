"""The mix probability (section 6.3, figure 4), and mixout on a new head (section 6.2).

Mixout and dropout over p at 300 sentences, each at one rate for every p: the one that the validation split chose for
mixout(w_pre, 0.7) and for dropout(0.1). With mixout(w_pre, 0.7) in the body, the new head is mixed with its own initial
weight, or is not mixed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common.report import BLUES, GREY, table, tidy

from . import finetuning, rates
from .finetuning import FILE, TENTHS, dropout, fine_tune, mixed_head, mixout, settings_of
from .intervals import difference
from .rates import accuracy_of
from .runs import Run, run_all
from .stability import BASELINE, complete, is_degenerate, paired

SIZE = 300
NAMES = ("mixout(w_pre, p)", "dropout(p), wdecay(0, 0.01)")
Runs = Mapping[str, Sequence[Run]]


class Results(NamedTuple):
    head: Runs  # mixout(w_pre, 0.7) without and with the head
    mixout: Mapping[float, Sequence[Run]]  # by p
    dropout: Mapping[float, Sequence[Run]]


def results(output: Path, *, quick: bool, workers: int) -> Results:
    """Run what is not finished yet (nothing, if ``workers`` is 0) and return what is."""
    path, scale, budget, tenths = output / FILE, finetuning.FULL, rates.FULL, TENTHS
    if quick:
        scale, budget, tenths = finetuning.QUICK, rates.QUICK, (0.1, 0.7)
    chosen = rates.search(path, (BASELINE, mixout(0.7)), budget, workers=workers)
    if len(chosen) < 2:
        return Results({}, {}, {})
    rate = {strategy: rates.best(means) for strategy, means in chosen.items()}

    def runs_of(strategies: Mapping[str, float]) -> Runs:
        settings = [
            settings_of(strategy, SIZE, rate, restart, scale)
            for restart in range(scale.restarts)
            for strategy, rate in strategies.items()
        ]
        return complete(run_all(path, settings, fine_tune, workers=workers), list(strategies))

    head = runs_of(dict.fromkeys((mixout(0.7), mixed_head(0.7)), rate[mixout(0.7)]))
    swept = runs_of({mixout(p): rate[mixout(0.7)] for p in tenths} | {dropout(p): rate[BASELINE] for p in tenths})
    return Results(head, {p: swept[mixout(p)] for p in tenths}, {p: swept[dropout(p)] for p in tenths})


PROTOCOL = f"""\
As in [the stability experiment](stability.md), with {SIZE} sentences. Each family has one rate for every p, which the
validation split chose for mixout(w_pre, 0.7) and for dropout(0.1). Weight decay is 0 with mixout.
"""


def page(results: Results) -> str:
    head = "# The mix probability and a new head (sections 6.3 and 6.2)\n"
    parts = "## The mix probability\n", *_sweep(results), "", "## A new head\n", *_head(results.head), ""
    return "\n".join([head, PROTOCOL, *parts])


def _sweep(results: Results) -> list[str]:
    if not any(results.dropout.values()):
        return [f"None of {finetuning.FULL.restarts} restarts is finished yet."]
    baseline = results.dropout[0.1]
    rows = [
        [f"{p:g}", *_cells(results.mixout[p]), *_cells(results.dropout[p]), _above(results.mixout[p], baseline)]
        for p in results.mixout
    ]
    mixed = next(iter(results.mixout.values()))
    heads = ["p", "mixout: mean ± sd", "degenerate", "dropout: mean ± sd", "degenerate", "mixout above dropout(0.1)"]
    return [
        f"{len(baseline)} of {finetuning.FULL.restarts} restarts are finished; rates {mixed[0]['rate']:g} (mixout) and "
        f"{baseline[0]['rate']:g} (dropout). The last column is in points of accuracy, paired by restart, with its "
        "95 % bootstrap interval (10,000 resamples, seed 0).",
        "",
        table(heads, rows, left=0),
        "",
        "![test accuracy over p](sweep.png)",
    ]


def _cells(runs: Sequence[Run]) -> list[str]:
    values = [accuracy_of(run) for run in runs]
    deviation = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return [f"{statistics.fmean(values):.1%}{deviation}", str(sum(map(is_degenerate, runs)))]


def _above(runs: Sequence[Run], baseline: Sequence[Run]) -> str:
    found = difference(*paired(runs, baseline))
    return "-" if found is None else found.in_points


def _head(runs: Runs) -> list[str]:
    finished = len(next(iter(runs.values()), ()))
    if not finished:
        return [f"None of {finetuning.FULL.restarts} restarts is finished yet."]
    without = runs[mixout(0.7)]
    rows = [[name, *_cells(of), "" if of is without else _above(of, without)] for name, of in runs.items()]
    heads = ["strategy", "mean ± sd", "degenerate", "points above the first line"]
    return [f"{finished} of {finetuning.FULL.restarts} restarts are finished.", "", table(heads, rows)]


def draw(results: Results, path: Path) -> None:
    """Mean accuracy over p with bands of a standard deviation, as figure 4; nothing before a restart is finished."""
    if not any(results.dropout.values()):
        return
    figure = Figure(figsize=(6, 3.8), layout="constrained", dpi=130)
    panel = figure.subplots()
    for name, colour, runs in zip(NAMES, (BLUES[0], GREY), (results.mixout, results.dropout), strict=True):
        values = {p: [100 * accuracy_of(run) for run in of] for p, of in runs.items() if of}
        means = np.array([statistics.fmean(of) for of in values.values()])
        deviations = np.array([statistics.stdev(of) if len(of) > 1 else 0.0 for of in values.values()])
        panel.plot(list(values), means, marker="o", markersize=3, color=colour, label=name)
        panel.fill_between(list(values), means - deviations, means + deviations, color=colour, alpha=0.2, linewidth=0)
    panel.set_xlabel("p")
    panel.set_ylabel("test accuracy, %")
    panel.legend(frameon=False)
    tidy(panel)
    figure.savefig(path, format="png")
