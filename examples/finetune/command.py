"""The command, from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common import assets
from benchmarks.common.errors import CommandError

from . import attention
from .arguments import parse_settings
from .data import load_task
from .memory import peak_mebibytes
from .model import Checkpoint
from .report import Report
from .training import total_steps, train_restart

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse_settings(arguments)
    report: Report | None = None
    try:
        checkpoint = Checkpoint(settings.model or assets.minilm(assets.cache_folder()), settings.max_length)
        task = load_task(settings, checkpoint.tokenizer)
        settings, said = attention.choose(settings, checkpoint, task)
        report = Report(settings, task, said)
        run(report, checkpoint)
    except CommandError as error:
        return _stopped(f"error: {error}", report, EXIT_FAILED)
    except KeyboardInterrupt:
        return _stopped("interrupted", report, EXIT_INTERRUPTED)
    print("\n".join(["", report.table(), "", *report.notes()]))
    print(f"\nreport.md, report.csv, report.json and report.png are in {settings.output}")
    if not any(summary.accuracies for summary in report.summaries()):
        return _stopped("error: every run failed; try a smaller --lr", None, EXIT_FAILED)
    return 0


def run(report: Report, checkpoint: Checkpoint) -> None:
    """Measures and trains with a progress bar; the report is written after every restart."""
    settings, task = report.settings, report.task
    console = Console(stderr=True)
    console.print(f"{task.description}\n{report.attention}", highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description:14}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("peak memory", total=len(settings.variants))
        for variant in settings.variants:
            report.memory[variant.name] = peak_mebibytes(settings, checkpoint, task, variant)
            progress.advance(bar)

        # One more per variant and restart for the evaluation.
        steps = total_steps(settings, len(task.train)) + 1
        bar = progress.add_task("training", total=settings.restarts * steps * len(settings.variants))
        for restart in range(settings.restarts):
            progress.update(bar, description=f"restart {restart + 1} of {settings.restarts}")
            results = train_restart(settings, checkpoint, task, restart, lambda: progress.advance(bar))
            report.results += results
            report.write()
            outcomes = (f"{result.variant} {result.failure or format(result.accuracy, '.1%')}" for result in results)
            progress.print(f"restart {restart + 1}: {'; '.join(outcomes)}", highlight=False, soft_wrap=True)


def _stopped(message: str, report: Report | None, code: int) -> int:
    if report is not None and report.results:
        message += f"; restarts finished: {report.restarts}, in {report.settings.output}"
    print(message, file=sys.stderr)
    return code
