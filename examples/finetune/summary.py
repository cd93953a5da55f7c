"""The restarts of each variant, summed up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .settings import Variant
from .training import Result


@dataclass(frozen=True)
class Summary:
    """One variant. Ratios are to the dropout variant, None where that was not run."""

    variant: str
    accuracies: list[float]  # of the runs that did not fail
    mean: float | None
    maximum: float | None
    std: float | None  # the sample standard deviation over restarts
    degenerate: int  # failed, or not above the share of the most frequent label
    runs: int
    step_ms: float | None  # the median over all steps but the first of each restart
    step_ratio: float | None
    memory_mib: float | None
    memory_ratio: float | None


def summarise(
    variants: Sequence[Variant],
    results: Sequence[Result],
    memory: Mapping[str, float | None],
    majority_rate: float,
) -> list[Summary]:
    """One summary per variant, in their order."""
    by_variant = {v.name: [result for result in results if result.variant == v.name] for v in variants}
    step_ms = {name: _median_ms(runs) for name, runs in by_variant.items()}
    reference = next((variant.name for variant in variants if variant.kind == "dropout"), "")
    summaries = []
    for name, runs in by_variant.items():
        accuracies = [run.accuracy for run in runs if run.accuracy is not None]
        summaries.append(
            Summary(
                variant=name,
                accuracies=accuracies,
                mean=statistics.fmean(accuracies) if accuracies else None,
                maximum=max(accuracies, default=None),
                std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                degenerate=len(runs) - sum(accuracy > majority_rate for accuracy in accuracies),
                runs=len(runs),
                step_ms=step_ms[name],
                step_ratio=_ratio(step_ms[name], step_ms.get(reference)),
                memory_mib=memory.get(name),
                memory_ratio=_ratio(memory.get(name), memory.get(reference)),
            )
        )
    return summaries


def _median_ms(runs: Sequence[Result]) -> float | None:
    seconds = [second for run in runs for second in run.step_seconds[1:]]
    return statistics.median(seconds) * 1e3 if seconds else None


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference
