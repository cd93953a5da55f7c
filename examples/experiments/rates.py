"""The learning rate of each strategy, chosen on a validation split by one rule and one budget for all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .finetuning import fine_tune
from .runs import Run, run_all

SIZE = 300  # sentences that are trained on


@dataclass(frozen=True)
class Budget:
    grid: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    lowest: float = 1e-5  # the grid is not extended beyond
    highest: float = 5e-3
    seeds: tuple[int, ...] = (100, 101, 102)  # others than those of the restarts that are reported
    rows: int = 500  # of the validation split
    steps: int | None = None

    def settings(self, strategy: str, rate: float, seed: int) -> dict[str, Any]:
        found = {"strategy": strategy, "size": SIZE, "rate": rate, "split": "validation", "rows": self.rows}
        return {**found, "restart": seed} | ({} if self.steps is None else {"steps": self.steps})


FULL, QUICK = Budget(), Budget(grid=(2e-4,), lowest=2e-4, highest=2e-4, seeds=(100,), rows=64, steps=2)
Means = dict[str, dict[float, float]]  # validation accuracy by strategy and rate


def search(path: Path, strategies: Sequence[str], budget: Budget, *, workers: int) -> Means:
    """Try the grid for every strategy, and double or halve its rate for as long as the best one is at an edge.

    A strategy whose search is not finished is left out: that happens where ``workers`` is 0.
    """
    tried = {strategy: list(budget.grid) for strategy in strategies}
    while True:
        settings = [
            budget.settings(strategy, rate, seed)
            for seed in budget.seeds
            for strategy in strategies
            for rate in tried[strategy]
        ]
        means = _means(run_all(path, settings, fine_tune, workers=workers), len(budget.seeds))
        whole = {strategy: of for strategy, of in means.items() if set(of) == set(tried[strategy])}
        further = {strategy: rate for strategy, of in whole.items() if (rate := beyond_the_edge(of, budget))}
        if not further:
            return whole
        for strategy, rate in further.items():
            tried[strategy].append(rate)


def best(means: Mapping[float, float]) -> float:
    """The rate with the best mean; the lower one of equals."""
    return min(means, key=lambda rate: (-means[rate], rate))


def beyond_the_edge(means: Mapping[float, float], budget: Budget) -> float | None:
    """The rate to try next, where the best one of all that were tried has a neighbour on one side only."""
    rate = best(means)
    if rate == max(means) and 2 * rate <= budget.highest:
        return 2 * rate
    if rate == min(means) and rate / 2 >= budget.lowest:
        return rate / 2
    return None


def accuracy_of(run: Run) -> float:
    """The accuracy; for a run that failed that of naming the most frequent label."""
    return run["majority"] if run["accuracy"] is None else run["accuracy"]


def _means(runs: Sequence[Run], seeds: int) -> dict[str, dict[float, float]]:
    """Of the rates of which every seed is finished."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run["strategy"], {}).setdefault(run["rate"], []).append(accuracy_of(run))
    return {
        strategy: {rate: statistics.fmean(values) for rate, values in of.items() if len(values) == seeds}
        for strategy, of in found.items()
    }
