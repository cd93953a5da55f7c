"""The result of a benchmark is a row per variant, written as a CSV and as entries of pytest-benchmark."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from .agreement import Verdict

_T = TypeVar("_T")
Fact = str | float | bool | None


@dataclass
class Row:
    """The samples of one variant, in seconds, with what else is known of it."""

    case: str  # what was computed: a shape, a model
    variant: str
    mode: str  # forward, backward, both; step
    samples: Sequence[float] = ()
    failure: str | None = None  # why there are no samples
    required: bool = True  # whether such a failure fails the run
    matches: bool | None = None  # the reference; None: there is none
    group: int = 0  # rows of a case that were not interleaved with others have another number
    facts: dict[str, Fact] = field(default_factory=dict)

    def judge(self, verdict: Verdict) -> None:
        self.matches = verdict.matches
        self.facts |= {"error_over_limit": verdict.worst, "largest_error": verdict.where}

    @property
    def name(self) -> str:
        return f"{self.case}-{self.variant}-{self.mode}" + (f"-group{self.group}" if self.group else "")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


@contextmanager
def attempt(rows: Sequence[Row]) -> Iterator[None]:
    """Let an error be the result of these rows: the others are measured all the same."""
    try:
        yield
    except Exception as error:
        for row in rows:
            row.failure = f"{type(error).__name__}: {error}"


def guarded(rows: Sequence[Row], sample: Callable[[], _T]) -> Callable[[], _T | None]:
    """Sample until it fails for the first time, and None from then on."""

    def guarded_sample() -> _T | None:
        found = None
        if not any(row.failure for row in rows):
            with attempt(rows):
                found = sample()
        return found

    return guarded_sample


class Run:
    """All rows of a run. ``baseline`` is the variant that the ratios of the CSV are taken to."""

    def __init__(self, machine: Mapping[str, str | int], baseline: str, rows: Sequence[Row]) -> None:
        self.machine, self.baseline = machine, baseline
        self.rows = list(rows)

    def find(self, case: str, variant: str, mode: str, group: int | None = None) -> Row | None:
        """Find a row that was measured; of a variant that several groups have, the first unless ``group`` is given."""
        for row in self.rows:
            if (row.case, row.variant, row.mode) == (case, variant, mode) and group in (None, row.group):
                return row if row.samples else None
        return None

    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def variants(self, case: str | None = None) -> list[str]:
        return list(dict.fromkeys(row.variant for row in self.rows if case in (None, row.case)))

    def ratio(self, row: Row | None, baseline: str | None = None) -> float | None:
        """The ratio of medians to a baseline in the same rounds.

        None where one of them was not measured or does not match the reference: however fast, a wrong result has none.
        """
        if row is None:
            return None
        other = self.find(row.case, baseline or self.baseline, row.mode, row.group)
        if other is None or not row.samples or row.matches is False or other.matches is False:
            return None
        return row.median / other.median

    def failures(self) -> list[str]:
        """One sentence for each variant that could not be measured."""
        return list(dict.fromkeys(f"{row.case}, {row.variant}: {row.failure}" for row in self.rows if row.failure))

    def write_csv(self, path: Path) -> None:
        machine = {name: self.machine[name] for name in ("device", "threads", "torch", "commit")}
        table = []
        for row in self.rows:
            line: dict[str, Fact] = {**machine, "case": row.case, "variant": row.variant, "mode": row.mode}
            line |= {**row.facts, "group": row.group, "matches_reference": row.matches, "rounds": len(row.samples)}
            if row.samples:
                low, high = row.quartiles
                line |= {"q1_seconds": low, "median_seconds": row.median, "q3_seconds": high}
            table.append({**line, "ratio": self.ratio(row), "failure": row.failure})
        columns = list(dict.fromkeys(name for line in table for name in line))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for line in table:
                writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in line.items()})

    def play(self, json_path: Path) -> int:
        """Report the rows through pytest-benchmark: its table, its JSON for ``pytest-benchmark compare``, its status.

        A row that failed, or that does not match the reference, is a test that fails.
        """
        here = Path(__file__).parent
        arguments = ["-c", str(here / "pytest.ini"), "--rootdir", str(here), str(here / "bench_rows.py")]
        return int(pytest.main([*arguments, f"--benchmark-json={json_path}"], plugins=[_Parametrised(self.rows)]))


class _Parametrised:
    """A plugin that gives ``bench_rows.py`` its rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("row", self.rows, ids=[row.name for row in self.rows])
