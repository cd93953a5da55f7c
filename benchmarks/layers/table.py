"""A run as Markdown."""

from __future__ import annotations

from benchmarks.common.report import failure_lines, machine_line, mebibytes, ratio_cell, reference_cell, table
from benchmarks.common.rows import Row, Run

from .layers import DROPOUT, LINEAR
from .measurement import MODES
from .targets import ROOFLINE, outcomes

HEADS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
_LEGEND = (
    "Medians of interleaved rounds: every round takes one sample of every layer, in random order. `x` is the ratio to "
    "nn.Linear in the same rounds. FLOP/s, GB/s and the share of the roofline are of forward + backward and count what "
    "the operation needs, whoever computes it: with a neuron mask dw is zero outside the kept columns. `saved` is what "
    "one forward keeps for backward, parameters and target aside. The reference check compares y, dx, dw and db with "
    "`mixout_kernels.reference` at the same seed; a layer that fails it gets no ratio."
)


def markdown(run: Run, device: str) -> str:
    sections = ["# Layer benchmark", machine_line(run.machine), failure_lines(run), _targets(run, device)]
    sections += [_summary(run), "## Every measurement", _LEGEND]
    for case in run.cases():
        sections += [f"### {_title(case)}", _noise(run, case), _case_table(run, case)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(case: str) -> str:
    shape, dtype = case.rsplit("-", 1)
    return f"{shape.replace('x', ' x ')}, {dtype}"


def _targets(run: Run, device: str) -> str:
    rows = [
        [
            _title(outcome.case) if outcome.target.case else f"every shape; worst: {_title(outcome.case)}",
            outcome.target.variant,
            HEADS[outcome.target.mode],
            outcome.target.baseline if outcome.target.baseline == ROOFLINE else _name(outcome.target.baseline),
            f"{outcome.target.limit:.2f}",
            "**wrong**" if outcome.ratio is None else f"{outcome.ratio:.2f}",
            "yes" if outcome.reached else "**no**",
        ]
        for outcome in outcomes(run, device)
    ]
    heads = ["rows x in x out", "layer", "time of", "ratio to", "at most", "measured", "reached"]
    return "## Targets\n\n" + table(heads, rows, left=4) if rows else ""


def _summary(run: Run) -> str:
    """Lay out shapes across, layers down; a GPU run has too many shapes for that, its plot shows them."""
    cases = run.cases()
    if len(cases) > 8:
        return ""
    layers = [layer for layer in run.variants() if layer != LINEAR]
    rows = [[_name(x), *(ratio_cell(run, run.find(case, x, "both")) for case in cases)] for x in layers]
    return "## Forward + backward, time / nn.Linear\n\n" + table(["layer", *map(_title, cases)], rows)


def _noise(run: Run, case: str) -> str:
    linear = run.find(case, LINEAR, "both")
    if linear is None:
        return ""
    low, high = linear.quartiles
    spread = (high - low) / linear.median
    warning = " **Too noisy: measure again on a quieter machine.**" if spread > 0.25 else ""
    return f"{len(linear.samples)} rounds; the quartiles of nn.Linear are {spread:.0%} of its median apart.{warning}"


def _case_table(run: Run, case: str) -> str:
    heads = ["layer", "matches the reference"]
    for mode in MODES:
        heads += [f"{HEADS[mode]} ms", "x"]
    heads += ["x Dropout", "GFLOP/s", "GB/s", "roofline", "saved MiB"]
    rows = []
    for layer in run.variants(case):
        entries = [run.find(case, layer, mode) for mode in MODES]
        main = entries[-1] or entries[0]
        if main is None:
            continue
        cells = [_name(layer), reference_cell(main)]
        for entry in entries:
            cells += ["-" if entry is None else f"{entry.median * 1e3:.4g}", ratio_cell(run, entry)]
        rows.append([*cells, ratio_cell(run, entries[-1], DROPOUT), *_rates(main)])
    return table(heads, rows, left=2)


def _rates(row: Row) -> list[str]:
    facts = row.facts
    rates = [f"{facts['gflop_per_second']:.4g}", f"{facts['gbyte_per_second']:.3g}", f"{facts['roofline_share']:.0%}"]
    return [*rates, mebibytes(facts["saved_bytes"])]


def _name(layer: str) -> str:
    return {LINEAR: "nn.Linear", DROPOUT: "Dropout(0.1) + nn.Linear"}.get(layer, layer)
