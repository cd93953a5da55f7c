"""The files of a report, the parts of its Markdown and of its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import Row, Run

matplotlib.use("Agg")

# Colour-blind safe: grey for what is compared with, orange for the plain formula, blues for this package.
GREY, ORANGE, BLUES = "#8c8c8c", "#e69f00", ("#0072b2", "#56b4e9", "#004c78", "#9ad0f5")


def write(run: Run, folder: Path, name: str, markdown: str, figure: Figure) -> int:
    """Write FOLDER/NAME.md, .csv, .png and pytest-benchmark's .json; return the status of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}.{kind}" for kind in ("md", "csv", "png", "json")}
    status = run.play(paths["json"])
    paths["md"].write_text(markdown)
    run.write_csv(paths["csv"])
    figure.savefig(paths["png"], format="png", dpi=130)
    print(*paths.values(), sep="\n")
    return status


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out a Markdown table whose first ``left`` columns are words and whose others are figures."""
    widths = [max(3, *map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(map(line, (heads, rule, *rows)))


def reference_cell(row: Row) -> str:
    return {None: "-", True: "yes", False: "**NO**"}[row.matches]


def ratio_cell(run: Run, row: Row | None, baseline: str | None = None, digits: int = 2) -> str:
    if row is not None and row.matches is False:
        return "**wrong**"
    ratio = run.ratio(row, baseline)
    return "-" if ratio is None else f"{ratio:.{digits}f}"


def mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def machine_line(machine: Mapping[str, str | int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items()) + "."


def failure_lines(run: Run) -> str:
    return "\n".join(f"- **Not measured:** {failure}" for failure in run.failures())


def tidy(axes: Axes) -> None:
    """Leave of the frame of bars what is needed."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
