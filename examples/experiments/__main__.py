"""``python -m examples.experiments COMMAND``: one command for each experiment; see README.md beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import digits, least_squares

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Output = Annotated[Path, typer.Option(help="where runs, page and figure go; finished runs there are kept")]
Quick = Annotated[bool, typer.Option("--quick", help="a few small runs, to see that everything works")]


@app.callback()
def _() -> None:
    """The experiments of the Mixout paper, at the scale of two cores."""


def _write(name: str, output: Path, page: str) -> None:
    (output / f"{name}.md").write_text(page)
    typer.echo(page)


@app.command("least-squares")
def _least_squares(output: Output = Path("results/experiments"), quick: Quick = False) -> None:
    """Supplement D, figure 5: the penalty of a quadratic loss, measured and in closed form. A minute."""
    _write("least-squares", output, least_squares.run(output, quick=quick))


@app.command("digits")
def _digits(output: Output = Path("results/experiments"), quick: Quick = False) -> None:
    """Section 4, figure 2: distance to the pretrained weights, target and source accuracy over p. Minutes."""
    _write("digits", output, digits.run(output, quick=quick))


if __name__ == "__main__":
    app()
