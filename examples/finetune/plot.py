"""The plot of a report: accuracy per restart, time per step, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.report import BLUES, GREY, ORANGE, tidy

from .summary import Summary


def save_plot(path: Path, title: str, summaries: Sequence[Summary], majority_rate: float, held_out: str) -> None:
    figure = Figure(figsize=(12, 1.9 + 0.55 * len(summaries)), layout="constrained", dpi=130)
    accuracy, time, memory = figure.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    colours = _colours(summaries)
    _draw_accuracy(accuracy, summaries, colours, majority_rate)
    accuracy.set_xlabel(f"{held_out} accuracy, % (dots: restarts, bar: mean)")
    _draw_bars(time, summaries, colours, lambda s: (s.step_ms, s.step_ratio), "milliseconds a step (median)")
    _draw_bars(memory, summaries, colours, lambda s: (s.memory_mib, s.memory_ratio), "peak memory, MiB")
    figure.suptitle(title, fontsize=11)
    accuracy.set_yticks(range(len(summaries)), [summary.variant for summary in summaries])
    accuracy.set_ylim(len(summaries) - 0.4, -0.6)
    figure.savefig(path, format="png")


def _colours(summaries: Sequence[Summary]) -> list[str]:
    blues = iter(BLUES * len(summaries))
    return [
        next(blues) if "kernels" in summary.variant else ORANGE if "plain" in summary.variant else GREY
        for summary in summaries
    ]


def _draw_accuracy(axes: Axes, summaries: Sequence[Summary], colours: Sequence[str], majority_rate: float) -> None:
    axes.axvline(100 * majority_rate, color="black", linewidth=1, linestyle=":", label="most frequent label")
    for place, (summary, colour) in enumerate(zip(summaries, colours, strict=True)):
        percent = [100 * accuracy for accuracy in summary.accuracies]
        axes.scatter(percent, [place] * len(percent), color=colour, s=36, alpha=0.7, linewidths=0)
        if summary.mean is not None:
            axes.plot([100 * summary.mean] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2.5)
            axes.annotate(
                f"{summary.mean:.1%}", (100 * summary.mean, place - 0.33), ha="center", va="bottom", fontsize=9
            )
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    tidy(axes)


def _draw_bars(
    axes: Axes,
    summaries: Sequence[Summary],
    colours: Sequence[str],
    figures: Callable[[Summary], tuple[float | None, float | None]],
    label: str,
) -> None:
    for place, (summary, colour) in enumerate(zip(summaries, colours, strict=True)):
        value, ratio = figures(summary)
        if value is None:
            axes.annotate("not measured", (0, place), va="center", fontsize=9, color=GREY)
            continue
        axes.barh(place, value, height=0.6, color=colour)
        text = f" {value:.0f}" if ratio is None else f" {value:.0f}  ({ratio:.2f} x)"
        axes.annotate(text, (value, place), va="center", fontsize=9)
    axes.set_xlabel(label)
    axes.margins(x=0.42)
    tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
