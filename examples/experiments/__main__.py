"""``python -m examples.experiments COMMAND``: one command for each experiment; see README.md beside this file."""

from __future__ import annotations

import os

# Read when torch is loaded: large CPU tensors on huge pages. Page faults are a tenth of a training step otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from pathlib import Path
from typing import Annotated

import typer

from . import digits, least_squares, paper_time, stability, stability_page, sweep

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Output = Annotated[Path, typer.Option(help="where runs, page and figure go; finished runs there are kept")]
Quick = Annotated[bool, typer.Option("--quick", help="a few small runs, to see that everything works")]
Workers = Annotated[int, typer.Option(min=1, help="runs at once, each with one thread and a gigabyte")]
ReportOnly = Annotated[bool, typer.Option("--report-only", help="page and figure of what is finished; nothing is run")]
RESULTS = Path("results/experiments")


@app.callback()
def _() -> None:
    """The experiments of the Mixout paper, at the scale of two cores."""


def _write(name: str, output: Path, page: str, quick: bool) -> None:
    page = f"> A quick run, to see that everything works: no result.\n\n{page}" if quick else page
    (output / f"{name}.md").write_text(page)
    typer.echo(page)


@app.command("least-squares")
def _least_squares(output: Output = RESULTS, quick: Quick = False) -> None:
    """Supplement D, figure 5: the penalty of a quadratic loss, measured and in closed form. A minute."""
    _write("least-squares", output, least_squares.run(output, quick=quick), quick)


@app.command("digits")
def _digits(output: Output = RESULTS, quick: Quick = False) -> None:
    """Section 4, figure 2: distance to the pretrained weights, target and source accuracy over p. Minutes."""
    _write("digits", output, digits.run(output, quick=quick), quick)


@app.command("stability")
def _stability(
    output: Output = RESULTS, quick: Quick = False, workers: Workers = 2, report_only: ReportOnly = False
) -> None:
    """Section 5, figure 3, table 1: restarts of every strategy, each at its own learning rate. Hours."""
    found = stability.results(output, quick=quick, workers=_workers(workers, quick, report_only))
    stability_page.draw(found, output / "stability.png")
    _write("stability", output, stability_page.page(found), quick)


@app.command("sweep")
def _sweep(
    output: Output = RESULTS, quick: Quick = False, workers: Workers = 2, report_only: ReportOnly = False
) -> None:
    """Sections 6.3 and 6.2, figure 4: mixout and dropout over p, and mixout on a new head. Hours."""
    found = sweep.results(output, quick=quick, workers=_workers(workers, quick, report_only))
    sweep.draw(found, output / "sweep.png")
    _write("sweep", output, sweep.page(found), quick)


@app.command("time")
def _time(output: Output = RESULTS, quick: Quick = False, report_only: ReportOnly = False) -> None:
    """Supplement E: the time of a training step of BERT-large. A quarter of an hour, and 15 GB of memory."""
    found = paper_time.results(output, quick=quick, report_only=report_only)
    paper_time.draw(found, output / "time.png")
    _write("time", output, paper_time.page(found), quick)


def _workers(workers: int, quick: bool, report_only: bool) -> int:
    """None runs nothing; a quick run is over before a second process has started."""
    return 0 if report_only else 1 if quick else workers


if __name__ == "__main__":
    app()
