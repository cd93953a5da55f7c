"""A run as Markdown tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.common.report import BLUES, GREY, failure_lines, machine_line, ratio_cell, reference_cell, table, tidy
from benchmarks.common.rows import Row, Run

from . import traffic
from .methods import ENGINES, Method, Model


def markdown(run: Run, model: Model, chosen: Sequence[Method]) -> str:
    """Write the report. Its tables lie between marks, by which docs/distributed.md shows them."""
    sections = [f"# Two ranks over a network: {model.description}", failure_lines(run), _goals(run, chosen)]
    for engine in ENGINES:
        if any(one.engine == engine for one in chosen):
            sections += [f"## {engine}", _marked(engine, _table(run, engine, chosen))]
    sections += ["## From the shapes of models", shapes(), _notes(run)]
    return "\n\n".join(section for section in sections if section) + "\n"


def shapes() -> str:
    """Show the arithmetic of traffic.py."""
    text = "Bytes sent, as a share of those without mixout. Exact on a CPU; on a GPU with the kernels' fixed capacity."
    return f"{text}\n\n{_marked('shapes', traffic.tables())}"


def _marked(name: str, text: str) -> str:
    return f"<!-- --8<-- [start:{name}] -->\n\n{text}\n\n<!-- --8<-- [end:{name}] -->"


def _table(run: Run, engine: str, chosen: Sequence[Method]) -> str:
    links = run.cases()
    heads = ["a step with", "sent MB", "targets MB"]
    heads += [head for link in links for head in (f"{link}: ms", "x dropout")]
    lines = []
    for one in chosen:
        rows = [run.find(link, one.name, engine) for link in links]
        measured = [row for row in rows if row is not None]
        if one.engine != engine or not measured:
            continue
        line = [one.name, *(f"{measured[0].facts[fact] / 1e6:.1f}" for fact in ("sent_bytes", "target_bytes"))]  # type: ignore[operator]
        for row in rows:
            line += ["-", "-"] if row is None else [f"{row.median * 1e3:.0f}", ratio_cell(run, row, "dropout")]
        lines.append([*line, reference_cell(measured[0])])
    return table([*heads, "same weights"], lines)


def _goals(run: Run, chosen: Sequence[Method]) -> str:
    lines = []
    for one in chosen:
        for link, goal in one.goals.items():
            ratio = run.ratio(run.find(link, one.name, one.engine), one.baseline)
            if ratio is not None:
                verdict = "yes" if ratio <= goal else "**no**"
                lines.append(
                    f"- {one.engine}, {link}, {one.name}: {ratio:.3f} x {one.baseline}, to reach at most {goal:.2f}: "
                    f"{verdict}"
                )
    return "\n".join(lines)


def _notes(run: Run) -> str:
    rounds = {row.case: len(row.samples) for row in run.rows if row.samples}
    notes = [
        "Medians of " + ", ".join(f"{number} rounds ({link})" for link, number in rounds.items()) + "; every round "
        "takes one sample of each method, in an order drawn anew, the same on both ranks. A step is zero_grad, "
        "forward, backward and SGD, between two barriers.",
        "Two processes of one thread each, over gloo, in two network namespaces joined by a veth pair; `tc` limits the "
        "rate of both ends. Sent is what rank 0's interface counts in a step.",
        "Gloo makes a reduce-scatter out of an all-reduce, so FSDP2 sends more here than over NCCL.",
        "Same weights: after the same steps, bit for bit those of the same mixout that sends everything (DDP), or of "
        "the one without the kept all-gather (FSDP2).",
        machine_line(run.machine),
    ]
    return "\n".join(f"- {note}" for note in notes)


def draw(run: Run, model: Model, chosen: Sequence[Method]) -> Figure:
    links = run.cases()
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(chosen)), layout="constrained")
    for number, (link, axes) in enumerate(zip(links, figure.subplots(1, len(links), squeeze=False)[0], strict=True)):
        for place, one in enumerate(chosen):
            row = run.find(link, one.name, one.engine)
            if row is not None:
                _bar(axes, place, row, run)
        axes.set_title(link, fontsize=10)
        axes.set_xlabel("ms a step (x dropout)")
        labels = [f"{one.engine}: {one.name}" for one in chosen] if number == 0 else [""] * len(chosen)
        axes.set_yticks(range(len(chosen)), labels, fontsize=8)
        axes.set_ylim(len(chosen) - 0.4, -0.6)
        axes.margins(x=0.35)
        tidy(axes)
    figure.suptitle(model.description, fontsize=11)
    return figure


def _bar(axes, place: int, row: Row, run: Run) -> None:  # type: ignore[no-untyped-def]
    milliseconds = row.median * 1e3
    axes.barh(place, milliseconds, height=0.65, color=BLUES[0] if "mixout" in row.variant else GREY)
    text = f" {milliseconds:.0f} ({ratio_cell(run, row, 'dropout')})"
    axes.annotate(text, (milliseconds, place), va="center", fontsize=8)
