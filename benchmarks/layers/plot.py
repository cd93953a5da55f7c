"""The ratio to nn.Linear by shape, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.common.rows import Run

from .table import HEADS

_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Style:
    label: str
    color: str
    marker: str
    filled: bool = True


# Without the zero target, which is in the table.
_STYLES = {
    "dropout-p0.1": Style("Dropout(0.1) + nn.Linear", "#666666", "D"),
    "plain-neuron-p0.7": Style("plain formula, neuron", "#d55e00", "s", False),
    "plain-weight-p0.7": Style("plain formula, weight", "#d55e00", "^", False),
    "compiled-neuron-p0.7": Style("torch.compile(formula), neuron", "#e69f00", "s"),
    "compiled-weight-p0.7": Style("torch.compile(formula), weight", "#e69f00", "^"),
    "mixout-neuron-p0.7": Style("mixout_kernels, neuron, p = 0.7", "#56b4e9", "o"),
    "mixout-neuron-p0.9": Style("mixout_kernels, neuron, p = 0.9", "#0055a4", "o"),
    "mixout-weight-p0.7": Style("mixout_kernels, weight, p = 0.7", "#00805a", "v"),
    "graddrop-neuron-p0.9": Style("GradDrop, neuron, grad_p = 0.9", "#cc79a7", "P"),
    "mixout-triton-fused-neuron-p0.9": Style("triton fused, neuron, p = 0.9", "#0055a4", "<", False),
    "mixout-triton-staged-neuron-p0.9": Style("triton staged, neuron, p = 0.9", "#0055a4", ">", False),
    "mixout-cuda-fused-neuron-p0.9": Style("cuda fused, neuron, p = 0.9", "#aa4499", "<", False),
    "mixout-cuda-staged-neuron-p0.9": Style("cuda staged, neuron, p = 0.9", "#aa4499", ">", False),
    "quack-dropout-p0.1": Style("quack dropout GEMM (forward only)", "#000000", "x"),
}


def draw(run: Run, device: str) -> Figure:
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = _by_rows(run) if device == "cuda" else _by_shape(run)
    threads = "" if device == "cuda" else f", {run.machine['threads']} threads"
    figure.suptitle(f"Time / nn.Linear on {run.machine['device']}{threads} (below 1 is faster)", fontsize=11)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _ratios(run: Run, variant: str, mode: str, cases: Sequence[tuple[float, str]]) -> tuple[list[float], list[float]]:
    """The places and ratios of a layer in those cases, given with their places, where it has a ratio."""
    found = [(place, run.ratio(run.find(case, variant, mode))) for place, case in cases]
    return [place for place, ratio in found if ratio is not None], [ratio for _, ratio in found if ratio is not None]


def _by_shape(run: Run) -> Figure:
    """Draw one line of marks per shape, one panel per direction: for a few shapes of all kinds."""
    cases = list(enumerate(run.cases()))
    styles = {variant: style for variant, style in _STYLES.items() if variant in run.variants()}
    figure = Figure(figsize=(14, 2.2 + 0.95 * len(cases)), layout="constrained")
    modes = ("both", "forward", "backward")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for index, (variant, style) in enumerate(styles.items()):
            places, ratios = _ratios(run, variant, mode, cases)
            # A little apart, since ratios of many layers coincide.
            offset = ((index + 0.5) / len(styles) - 0.5) * 0.8
            _marks(axes, ratios, [place + offset for place in places], style)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        _ratio_ticks(axes, "x")
        axes.set_title(HEADS[mode])
        axes.set_ylim(len(cases) - 0.5, -0.5)
        for boundary in range(1, len(cases)):
            axes.axhline(boundary - 0.5, color="#dddddd", linewidth=0.8)
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(cases)), [case.replace("-", "\n").replace("x", " x ") for _, case in cases])
    panels[0].set_ylabel("rows x in x out")
    return figure


def _by_rows(run: Run) -> Figure:
    """Draw the ratio over the number of rows, one panel per weight and dtype: for a grid of shapes."""
    weights: dict[str, list[tuple[float, str]]] = {}
    for case in run.cases():
        rows, weight = case.split("x", 1)
        weights.setdefault(weight, []).append((int(rows), case))
    columns = min(4, len(weights))
    lines = -(-len(weights) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.5, 3.1 * lines + 1.8), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, (weight, cases) in zip(panels, weights.items(), strict=False):
        for variant, style in _STYLES.items():
            mode = "both" if any(run.find(case, variant, "both") for _, case in cases) else "forward"
            _marks(axes, *_ratios(run, variant, mode, sorted(cases)), style, line=True)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"in x out = {weight.replace('-', ', ').replace('x', ' x ')}")
        axes.set_xlabel("rows")
        axes.grid(color="#eeeeee")
        _ratio_ticks(axes, "y")
    for axes in panels[len(weights) :]:
        axes.remove()
    figure.supylabel("forward + backward")
    return figure


def _marks(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, line: bool = False) -> None:
    if not x:
        return  # else it would be in the legend
    axes.plot(
        x,
        y,
        linestyle="-" if line else "none",
        linewidth=1,
        marker=style.marker,
        markersize=6,
        color=style.color,
        markerfacecolor=style.color if style.filled else "white",
        label=style.label,
    )


def _ratio_ticks(axes: Axes, which: str) -> None:
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
