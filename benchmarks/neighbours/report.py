"""A run as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.common.report import (
    BLUES,
    GREY,
    ORANGE,
    failure_lines,
    machine_line,
    mebibytes,
    ratio_cell,
    reference_cell,
    table,
    tidy,
)
from benchmarks.common.rows import Row, Run
from benchmarks.step.workload import Workload

from .variants import LOOP, FisherPass, Step


def markdown(run: Run, workload: Workload, steps: Mapping[str, Step], passes: Mapping[str, FisherPass]) -> str:
    sections = [f"# The neighbours of mixout: {workload.description}", failure_lines(run)]
    if not workload.goals:
        sections.append("- A smoke test on a tiny model: its times say nothing.")
    sections += [_goals(run, steps, passes), _steps(run, steps), _passes(run), _notes(run)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _measured(run: Run, mode: str) -> list[Row]:
    return [row for row in run.rows if row.samples and row.mode == mode]


def _steps(run: Run, steps: Mapping[str, Step]) -> str:
    heads = ["step", "matches the reference", "ms", "x no regularisation", "x dropout 0.1", "x published form"]
    lines = []
    for row in _measured(run, "step"):
        published = steps[row.variant].published
        line = [row.variant, reference_cell(row), f"{row.median * 1e3:.1f}"]
        line += [ratio_cell(run, row, baseline, digits=3) for baseline in ("no regularisation", "dropout 0.1")]
        line += [ratio_cell(run, row, published, digits=3) if published else "-"]
        lines.append([*line, mebibytes(row.facts.get("saved_bytes"))])  # type: ignore[arg-type]
    return table([*heads, "saved MiB"], lines, left=2)


def _passes(run: Run) -> str:
    heads = ["Fisher information of one batch", "matches the reference", "ms", "the loop / it"]
    lines = []
    for row in _measured(run, "fisher"):
        ratio = run.ratio(row, LOOP)
        lines.append(
            [row.variant, reference_cell(row), f"{row.median * 1e3:.1f}", f"{1 / ratio:.2f}" if ratio else "-"]
        )
    return table(heads, lines, left=2)


def _goals(run: Run, steps: Mapping[str, Step], passes: Mapping[str, FisherPass]) -> str:
    lines = []
    for row in _measured(run, "step"):
        step = steps[row.variant]
        if step.goal is not None and (ratio := run.ratio(row, step.baseline)) is not None:
            verdict = "yes" if ratio <= step.goal else "**no**"
            lines.append(f"- {row.variant}: {ratio:.3f} x {step.baseline}, to reach at most {step.goal:.2f}: {verdict}")
    for row in _measured(run, "fisher"):
        goal = passes[row.variant].goal
        if goal is not None and (ratio := run.ratio(row, LOOP)) is not None:
            verdict = "yes" if 1 / ratio >= goal else "**no**"
            lines.append(f"- {row.variant}: the loop takes {1 / ratio:.2f} x, to reach at least {goal}: {verdict}")
    return "\n".join(lines)


def _notes(run: Run) -> str:
    notes = [
        f"Medians of {max((len(row.samples) for row in run.rows), default=0)} rounds; every round takes one sample of "
        "each variant, in random order. A step is zero_grad, forward, backward and fused AdamW.",
        "GradDrop and Child-Tuning-F have a MixSampler, and mask every parameter but the head (Child-Tuning-F: all).",
        "As published: a Bernoulli mask on the gradient of every parameter before the optimizer's step "
        "(Child-Tuning-F), a fixed one (D), two forwards and kl_div of probabilities (R3F), one example at a time "
        "(Fisher).",
        "mk.fisher runs the first batch of a call backward a second time, to see that no module mixes examples: this "
        "call has one batch, so the check is a third of its time.",
        "The reference check compares gradients with mixout_kernels.reference under the same masks, the Fisher "
        "information with the loop in float64. What has noise or dropout is compared in the tests only.",
        machine_line(run.machine),
    ]
    return "\n".join(f"- {note}" for note in notes)


def draw(run: Run, workload: Workload, steps: Mapping[str, Step]) -> Figure:
    rows = _measured(run, "step")
    figure = Figure(figsize=(10, 1.4 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        low, median, high = (1e3 * value for value in (row.quartiles[0], row.median, row.quartiles[1]))
        axes.barh(place, median, height=0.65, color=_colour(row), xerr=[[median - low], [high - median]])
        axes.annotate(f"  {median:.0f} ms ({ratio_cell(run, row, digits=2)} x)", (high, place), va="center", fontsize=9)
    axes.set_xlabel("milliseconds a step (median, quartiles; ratio to the step without regularisation)")
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.3)
    tidy(axes)
    figure.suptitle(workload.description, fontsize=11)
    return figure


def _colour(row: Row) -> str:
    if "published" in row.variant or "hooks" in row.variant or "forwards" in row.variant:
        return ORANGE
    return GREY if row.variant in ("no regularisation", "dropout 0.1") else BLUES[0]
