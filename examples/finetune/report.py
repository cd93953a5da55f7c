"""The report of a run: Markdown, CSV, JSON with every single step, and a plot, written anew after every restart."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.errors import CommandError
from benchmarks.common.report import machine_line, table

from .data import Task
from .plot import save_plot
from .settings import Settings
from .summary import Summary, summarise
from .training import Result, total_steps


class Report:
    def __init__(self, settings: Settings, task: Task, attention: str) -> None:
        self.settings, self.task, self.attention = settings, task, attention
        self.machine = machine.describe()
        self.memory: dict[str, float | None] = {}  # per variant, in MiB
        self.results: list[Result] = []
        # Now, not after the first restart: a folder that cannot be written must not cost one.
        with _written_at_once(settings.output / ".probe") as path:
            path.touch()
        (settings.output / ".probe").unlink()

    @property
    def restarts(self) -> int:
        return len({result.restart for result in self.results})

    def summaries(self) -> list[Summary]:
        return summarise(self.settings.variants, self.results, self.memory, self.task.majority_rate)

    def write(self) -> None:
        folder = self.settings.output
        with _written_at_once(folder / "report.json") as path:
            path.write_text(json.dumps(self.as_json(), indent=1, default=str) + "\n", encoding="utf-8")
        with _written_at_once(folder / "report.md") as path:
            path.write_text(self.markdown(), encoding="utf-8")
        with _written_at_once(folder / "report.csv") as path:
            self._write_csv(path)
        with _written_at_once(folder / "report.png") as path:
            save_plot(path, self.title(), self.summaries(), self.task.majority_rate, self.settings.held_out)

    def title(self) -> str:
        steps = total_steps(self.settings, len(self.task.train))
        name = self.settings.model.name if self.settings.model else "all-MiniLM-L6-v2"
        return f"{name} on {len(self.task.train)} texts: {self.restarts} restarts of {steps} steps, ratios to dropout"

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "machine": self.machine,
            "task": {
                "description": self.task.description,
                "labels": self.task.label_names,
                "train_rows": len(self.task.train),
                "test_rows": len(self.task.test),
                "majority_rate": self.task.majority_rate,
            },
            "restarts_finished": self.restarts,
            "summary": [asdict(summary) for summary in self.summaries()],
            "runs": [asdict(result) for result in self.results],
        }

    def _write_csv(self, path: Path) -> None:
        """Write one line per restart and variant."""
        machine = {name: self.machine[name] for name in ("device", "threads", "torch", "commit")}
        with path.open("w", newline="", encoding="utf-8") as file:
            writer: csv.DictWriter[str] | None = None
            for result in self.results:
                line = {**machine, "split": self.settings.held_out, "lr": self.settings.lr, **result.as_line()}
                line["peak_mib"] = _format(self.memory.get(result.variant), ".1f")
                if writer is None:
                    writer = csv.DictWriter(file, list(line), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)

    def markdown(self) -> str:
        plot = "![accuracy, time and memory per variant](report.png)"
        return "\n".join(["# Fine-tuning", "", self.table(), "", *self.notes(), "", plot, ""])

    def table(self) -> str:
        columns = {
            "variant": lambda line: line.variant,
            "mean acc.": lambda line: _format(line.mean, ".1%"),
            "max acc.": lambda line: _format(line.maximum, ".1%"),
            "std": lambda line: _format(line.std, ".1%"),
            "degenerate": lambda line: f"{line.degenerate} of {line.runs}",
            "ms a step": lambda line: _format(line.step_ms, ".0f"),
            "time / dropout": lambda line: _format(line.step_ratio, ".2f"),
            "peak MiB": lambda line: _format(line.memory_mib, ".0f"),
            "memory / dropout": lambda line: _format(line.memory_ratio, ".2f"),
        }
        return table(list(columns), [[cell(line) for cell in columns.values()] for line in self.summaries()])

    def notes(self) -> list[str]:
        settings, task = self.settings, self.task
        model = settings.model or "all-MiniLM-L6-v2, 22.7M parameters"
        masks = sorted({variant.mask for variant in settings.variants if variant.kind in ("plain", "mixout")})
        failures = [
            f"- Failed: {result.variant}, restart {result.restart + 1} (seed {result.seed}): {result.failure}."
            for result in self.results
            if result.failure
        ]
        return [
            *failures,
            f"- {self.restarts} of {settings.restarts} restarts, {total_steps(settings, len(task.train))} steps each, "
            f"batch {settings.batch_size} x {settings.max_length} tokens, {settings.precision}. In a restart all "
            "variants have the same seed, head and batches, and take their steps in turn.",
            f"- {self.attention}",
            f"- Model: {model}. Fused AdamW, learning rate {settings.lr:g}, linear warm-up and decay.",
            f"- Task: {task.description}; labels: {', '.join(task.label_names)}.",
            f"- Dropout: the rates of the checkpoint, and weight decay {settings.weight_decay:g}. Mixout replaces "
            f"both{''.join(f'; mask={mask!r}' for mask in masks)}.",
            f"- Accuracy on the {settings.held_out} split: mean, maximum and sample standard deviation over restarts. "
            f"Degenerate: failed, or not above {task.majority_rate:.1%}, the share of the most frequent label.",
            "- Milliseconds: median over all steps but the first of each restart; forward, backward and optimizer.",
            "- Peak MiB: rise of the resident memory of a fresh process that trains this variant alone, from "
            "before its model is loaded.",
            f"- {machine_line(self.machine)}",
        ]


@contextmanager
def _written_at_once(path: Path) -> Iterator[Path]:
    """A path beside this one to write to, renamed at the end: a reader never sees half a file."""
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"--output {path.parent}: cannot write there: {error.strerror}") from None


def _format(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
