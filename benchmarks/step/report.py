"""A run as a Markdown table and as a plot."""

from __future__ import annotations

from matplotlib.axes import Axes
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

from .measurement import STEPS_ON_GPU
from .variants import Variant
from .workload import Workload

_FACTS = ("kind", "p", "run", "precision", "attention")


def markdown(run: Run, workload: Workload) -> str:
    sections = [f"# A training step: {workload.description}", failure_lines(run), _goals(run, workload)]
    sections += [_table(run, workload), _notes(run, workload)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _variant(row: Row) -> Variant:
    kind, p, mode, precision, attention = (row.facts[name] for name in _FACTS)
    return Variant(kind, p, mode, precision, attention)


def _alike(row: Row) -> str:
    """The name of the step with dropout that is run in the same way."""
    return _variant(row).dropout_alike.name


def _measured(run: Run) -> list[Row]:
    """The rows with a time, a baseline that several groups have once."""
    found: dict[str, Row] = {}
    for row in run.rows:
        if row.samples:
            found.setdefault(row.variant, row)
    return list(found.values())


def _table(run: Run, workload: Workload) -> str:
    on_gpu = workload.device == "cuda"
    heads = ["step", "matches the reference", "ms", "quartiles", "x dropout", "x dropout run alike"]
    heads += ["peak MiB", "saved MiB", "targets MiB", "Phi MiB", *(["launches"] if on_gpu else [])]
    lines = []
    for row in _measured(run):
        low, high = row.quartiles
        line = [row.variant, reference_cell(row), f"{row.median * 1e3:.1f}", f"{low * 1e3:.1f} - {high * 1e3:.1f}"]
        line += [ratio_cell(run, row, digits=3), ratio_cell(run, row, _alike(row), digits=3)]
        line += [mebibytes(row.facts.get(name) or None) for name in _MEMORY]
        lines.append([*line, *([str(row.facts.get("launches") or "-")] if on_gpu else [])])
    return table(heads, lines, left=2)


_MEMORY = ("peak_bytes", "saved_bytes", "target_bytes", "mixed_bytes")


def _goals(run: Run, workload: Workload) -> str:
    lines = []
    for row in _measured(run):
        variant = _variant(row)
        limit = workload.goals.get((variant.precision, variant.attention, variant.p))
        if variant.kind == "sampler" and variant.mode != "compiled" and limit is not None:
            ratio = run.ratio(row, _alike(row))
            verdict = "yes" if ratio is not None and ratio <= limit else "**no**"
            cell = ratio_cell(run, row, _alike(row), digits=3)
            lines.append(f"- {variant.name}: {cell} x dropout run alike, to reach at most {limit:.2f}: {verdict}")
    return "\n".join(lines)


def _notes(run: Run, workload: Workload) -> str:
    on_gpu = workload.device == "cuda"
    peak = (
        "torch.cuda.max_memory_allocated above what was allocated before"
        if on_gpu
        else "rise of the resident memory of a fresh process that trains this variant alone, from before its model is "
        "loaded (not measured where a compiler would be part of it)"
    )
    rounds = max((len(row.samples) for row in run.rows), default=0)
    sample = f"{STEPS_ON_GPU} steps in a row" if on_gpu else "one step"
    notes = [
        f"Medians of {rounds} rounds; every round takes {sample} of each variant, in random order. A step is "
        "zero_grad, forward, backward and optimizer.",
        "x dropout: to the first row. x dropout run alike: to the step with dropout that has the same precision and "
        "attention, and is eager, compiled or a CUDA graph as well. The goals are of the latter.",
        "float32, unless a row says bf16 or fp16: those are under autocast. medium: float32 with "
        'torch.set_float32_matmul_precision("medium").',
        "The plain formula and its compiled form cost the same for every p.",
        f"Peak: {peak}.",
        "Saved: what one forward keeps for backward; weights, targets and Phi aside. Phi: the mixed weights that the "
        "sampler keeps.",
    ]
    if run.machine.get("threads") == 1 and not on_gpu:
        notes.append("One thread, in CPU time: of a machine that was busy with other work.")
    if on_gpu:
        notes += [
            "Saved counts the casts of weights that nn.Linear keeps under autocast. Phi, which takes their place, is "
            "not in it.",
            "CUDA graph: the whole step, with the optimizer's part and the sampler's, in one launch. It trains the "
            "weights of its eager row: their peak is not measured twice.",
            "At most a few models are in memory at a time; ratios are taken within such a group.",
        ]
    notes.append(
        "The reference check compares all gradients with mixout_kernels.reference under the same masks; a step that "
        "fails it gets no ratio."
    )
    if not workload.goals:
        notes.append("A smoke test on a tiny model: its times say nothing.")
    return "\n".join(f"- {note}" for note in [*notes, machine_line(run.machine)])


def draw(run: Run, workload: Workload) -> Figure:
    rows = _measured(run)
    has_memory = any(row.facts.get("peak_bytes") is not None for row in rows)
    figure = Figure(figsize=(12 if has_memory else 9, 1.6 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 1 + has_memory, sharey=True, squeeze=False, width_ratios=(1.4, 1)[: 1 + has_memory])[0]
    _draw_times(panels[0], run, rows)
    if has_memory:
        _draw_memory(panels[1], rows)
    panels[0].set_yticks(range(len(rows)), [row.variant for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for panel in panels:
        panel.margins(x=0.3)
        tidy(panel)
    figure.suptitle(workload.description, fontsize=11)
    return figure


def _draw_times(panel: Axes, run: Run, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        low, median, high = (1e3 * value for value in (row.quartiles[0], row.median, row.quartiles[1]))
        error = [[median - low], [high - median]]
        colour = _colour(_variant(row))
        panel.barh(place, median, height=0.65, color=colour, xerr=error, error_kw={"ecolor": "black", "lw": 1})
        panel.annotate(
            f"  {median:.0f} ms ({ratio_cell(run, row, digits=3)} x)",
            (high, place),
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    panel.set_xlabel("milliseconds a step (median, quartiles; ratio to dropout)")


def _draw_memory(panel: Axes, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        peak = row.facts.get("peak_bytes")
        if peak is None:
            panel.annotate(" not measured", (0, place), va="center", fontsize=9, color=GREY)
        else:
            panel.barh(place, peak / 2**20, height=0.65, color=_colour(_variant(row)))
            panel.annotate(f" {peak / 2**20:.0f}", (peak / 2**20, place), va="center", fontsize=9)
    panel.set_xlabel("peak memory, MiB")


def _colour(variant: Variant) -> str:
    if variant.ours:
        return BLUES[0] if variant.p == 0.7 else BLUES[1]
    return ORANGE if variant.kind == "plain" else GREY
