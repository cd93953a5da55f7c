"""The picture of the README and of the documentation's first page, out of a committed run of `make bench-step`.

python tools/readme_picture.py benchmarks/results/step/minilm.csv docs/step.png
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

OURS, OURS_PALE, OTHERS, TEXT = "#1f6feb", "#b6d0f7", "#8c959f", "#57606a"

# What a bar is called, the variant whose time it shows, and the variant that is pale behind it.
BARS = [
    ("dropout 0.1", "dropout 0.1", None),
    ("mixout, plain PyTorch", "plain formula, p=0.7", None),
    ("no regularisation", "no regularisation", None),
    ("mixout_kernels, p = 0.7", "mixout_kernels, sampler, p=0.7", "mixout_kernels, GEMMs of nn.Linear, p=0.7"),
    ("mixout_kernels, p = 0.9", "mixout_kernels, sampler, p=0.9", "mixout_kernels, GEMMs of nn.Linear, p=0.9"),
]


@dataclass(frozen=True)
class Bar:
    label: str
    ratio: float  # of its time to that of dropout
    pale: float | None  # the same, with the GEMMs of F.linear in place of ours


def read(path: Path) -> tuple[list[Bar], str]:
    """The bars, and the line that says what was measured and where."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}

    def ratio(variant: str) -> float:
        if variant not in rows or not rows[variant]["ratio"]:
            sys.exit(f"{path}: expected a row {variant!r} with a ratio, got {', '.join(rows)}")
        return float(rows[variant]["ratio"])

    bars = [Bar(label, ratio(variant), None if pale is None else ratio(pale)) for label, variant, pale in BARS]
    dropout = rows[BARS[0][1]]
    return bars, f"{dropout['device']}, {dropout['threads']} threads, torch {dropout['torch'].partition('+')[0]}"


def draw(bars: list[Bar], machine: str) -> Figure:
    figure = Figure(figsize=(7.4, 3.0), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for y, bar in enumerate(bars):
        if bar.pale is not None:
            axes.barh(y, bar.pale, height=0.66, color=OURS_PALE)
            axes.text(bar.pale + 0.01, y, f"{bar.pale:.2f} with the GEMMs of F.linear", va="center", color=TEXT, size=8)
        axes.barh(y, bar.ratio, height=0.66, color=OTHERS if bar.pale is None else OURS)
        axes.text(
            bar.ratio - 0.01, y, f"{bar.ratio:.2f}", va="center", ha="right", color="white", weight="bold", size=9
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("Time of a training step, dropout = 1 (MiniLM, float32, on a CPU)", loc="left", size=11)
    axes.set_xlabel(machine, loc="left", color=TEXT, size=8)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(*read(Path(sys.argv[1]))).savefig(sys.argv[2])
