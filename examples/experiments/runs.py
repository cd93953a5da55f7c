"""Finished runs of an experiment, one JSON line each: an interrupted experiment goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Settings = Mapping[str, Any]
Run = dict[str, Any]  # settings and results side by side


def run_all(path: Path, settings: Iterable[Settings], run: Callable[..., Mapping[str, Any]]) -> list[Run]:
    """``run(**settings)`` for every settings that ``path`` has no line of yet; all runs, in the order of settings."""
    wanted = [dict(one) for one in settings]
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = {_key(line["settings"]): line for line in _lines(path)}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress, path.open("a") as file:
        task = progress.add_task(path.stem, total=len(wanted))
        for one in wanted:
            if _key(one) not in finished:
                line = {"settings": one, "results": dict(run(**one))}
                file.write(json.dumps(line) + "\n")
                file.flush()
                finished[_key(one)] = line
            progress.advance(task)
    return [{**one, **finished[_key(one)]["results"]} for one in wanted]


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
