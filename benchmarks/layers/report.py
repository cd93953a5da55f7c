"""Table, CSV and plot of a saved run: ``python -m benchmarks.layers.report JSON --output DIR``."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from .plot import draw
from .results import Run
from .table import markdown


def write(json_path: Path, output: Path) -> list[Path]:
    """DIR/<name of the JSON>.md, .csv and .png; returns their paths."""
    run = Run.load(json_path)
    output.mkdir(parents=True, exist_ok=True)
    stem = output / json_path.stem
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".csv", ".png")]
    paths[0].write_text(markdown(run))
    _write_csv(run, paths[1])
    draw(run, paths[2])
    return paths


def _write_csv(run: Run, path: Path) -> None:
    device = {"device": run.machine["device"], "torch": run.machine["torch"]}
    with path.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for entry in run.entries.values():
            info = {name: value for name, value in entry.info.items() if name != "event_ms"}
            row = {
                **device,
                "variant": entry.variant,
                "mode": entry.mode,
                **info,
                "rounds": entry.rounds,
                "q1_seconds": entry.quartiles[0],
                "median_seconds": entry.seconds,
                "q3_seconds": entry.quartiles[1],
                "ratio_to_linear": run.ratio(entry.case, entry.variant, entry.mode),
            }
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers.report", description=__doc__)
    parser.add_argument("json", type=Path, help="pytest-benchmark's JSON, as python -m benchmarks.layers saves it")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        paths = write(options.json, options.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
