"""Finished runs of an experiment, one JSON line each: an interrupted experiment goes on where it stopped."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Settings = Mapping[str, Any]
Run = dict[str, Any]  # settings and results side by side


def run_all(
    path: Path, settings: Iterable[Settings], run: Callable[..., Mapping[str, Any]], *, workers: int = 1
) -> list[Run]:
    """``run(**settings)`` for every settings that ``path`` has no line of yet; all runs, in the order of settings.

    Args:
        path: of the JSON lines; each is written as soon as its run has finished.
        settings: in the order in which they are run.
        run: a function that can be pickled, where there are several workers.
        workers: how many runs go on at once, each in a process of its own if there are several. 0 runs nothing: what
            is finished is all that is returned.
    """
    wanted = [dict(one) for one in settings]
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {_key(line["settings"]): line for line in _lines(path)}
    missing = [one for one in wanted if _key(one) not in known]
    if workers and missing:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns) as progress, path.open("a") as file:
            task = progress.add_task(path.stem, total=len(wanted), completed=len(wanted) - len(missing))
            for one, results in _results(missing, run, workers):
                line = {"settings": one, "results": results}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
                file.flush()
                known[_key(one)] = line
                progress.advance(task)
    return [{**one, **known[_key(one)]["results"]} for one in wanted if _key(one) in known]


def finished(path: Path) -> list[Run]:
    """All runs that ``path`` has a line of, in the order in which they finished."""
    return [{**line["settings"], **line["results"]} for line in _lines(path)]


def _results(
    settings: Sequence[Settings], run: Callable[..., Mapping[str, Any]], workers: int
) -> Iterator[tuple[Settings, Run]]:
    """Settings and results of each run, as they finish."""
    if workers == 1:
        yield from ((one, dict(run(**one))) for one in settings)
        return
    # Spawned: a fork of a process whose torch has threads already can hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        started = {pool.submit(run, **one): one for one in settings}
        yield from ((started[done], dict(done.result())) for done in as_completed(started))
    finally:
        pool.shutdown(cancel_futures=True)


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # the process ended within a line: that run is done again
        lines.pop()
        path.write_text("".join(lines))
    return [json.loads(line) for line in lines]
