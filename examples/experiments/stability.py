"""Stability (section 5, figure 3, table 1): restarts that differ in head, batches and masks alone.

Every strategy has the learning rate that a validation split chose for it (``rates.py``). All strategies of a restart
start from the same head and see the same batches, so that they are compared in pairs.

Other than in the paper: MiniLM (22.7M parameters) in place of BERT-large, and labelled sentences of film reviews in
place of GLUE; the sentences trained on are the same in every restart, as in the paper. A harder setting stands for the
small tasks on which BERT-large fails: 100 sentences at four times the chosen rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import finetuning, rates
from .finetuning import FILE, Scale, dropout, fine_tune, mixout, settings_of, wdecay
from .runs import Run, Settings, run_all

BASELINE = dropout(0.1)
# In the order in which they are run: what the paper's claim is about has its restarts first.
TIERS = (
    (BASELINE, mixout(0.7), mixout(0.8), mixout(0.9)),
    (*map(wdecay, (0.01, 0.04, 0.07, 0.1)), f"{mixout(0.7)}, {wdecay(0.01)}"),
    ("GradDrop(0.5)", "guided dropout", "R3F"),
)
QUICK_TIERS = ((BASELINE, mixout(0.7)),)


@dataclass(frozen=True)
class Stage:
    """A number of training sentences, and the factor on the rate that was chosen for a strategy."""

    size: int
    factor: float = 1.0

    @property
    def title(self) -> str:
        harder = f", {self.factor:g} times the chosen rate" if self.factor != 1 else ""
        return f"{self.size} sentences{harder}"


# In the order in which they are run. Those of a group go on side by side, restart by restart: an experiment that is cut
# off has as many of either.
GROUPS = ((Stage(300), Stage(100, 4)), (Stage(100),), (Stage(700),))


class Results(NamedTuple):
    means: rates.Means  # on the validation split
    restarts: dict[Stage, dict[str, list[Run]]]  # of each stage and strategy, those that its whole tier has finished


def results(output: Path, *, quick: bool, workers: int) -> Results:
    """Run what is not finished yet (nothing, if ``workers`` is 0) and return what is."""
    path, tiers, groups, scale, budget = output / FILE, TIERS, GROUPS, finetuning.FULL, rates.FULL
    if quick:
        tiers, groups, scale, budget = QUICK_TIERS, GROUPS[:1], finetuning.QUICK, rates.QUICK
    found = Results({}, {stage: {} for group in groups for stage in group})
    for group in groups:
        for tier in tiers:
            means = rates.search(path, tier, budget, workers=workers)
            found.means.update(means)
            run_all(path, in_order(group, means, scale), fine_tune, workers=workers)
            for stage in group:
                runs = run_all(path, in_order([stage], means, scale), fine_tune, workers=0)
                found.restarts[stage].update(complete(runs, list(means)))
    return found


def in_order(stages: Sequence[Stage], means: rates.Means, scale: Scale) -> list[Settings]:
    """Restart by restart, in each of them stage by stage, and in each of these all strategies."""
    return [
        settings_of(strategy, stage.size, stage.factor * rates.best(of), restart, scale)
        for restart in range(scale.restarts)
        for stage in stages
        for strategy, of in means.items()
    ]


def complete(runs: Sequence[Run], strategies: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of each strategy in the order of restarts, without restarts that some strategy has not finished."""
    finished = {(run["strategy"], run["restart"]): run for run in runs}
    restarts = sorted({restart for _, restart in finished})
    whole = [restart for restart in restarts if all((strategy, restart) in finished for strategy in strategies)]
    return {strategy: [finished[strategy, restart] for restart in whole] for strategy in strategies}


def paired(runs: Sequence[Run], others: Sequence[Run]) -> tuple[list[float], list[float]]:
    """The accuracies of both in the restarts that both have."""
    first, second = ({run["restart"]: rates.accuracy_of(run) for run in of} for of in (runs, others))
    shared = sorted(first.keys() & second.keys())
    return [first[restart] for restart in shared], [second[restart] for restart in shared]


def is_degenerate(run: Run) -> bool:
    """It failed, or is less than two points better than to name the most frequent label always."""
    return run["accuracy"] is None or run["accuracy"] < run["majority"] + 0.02
