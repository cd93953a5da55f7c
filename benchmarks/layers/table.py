"""A run as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .results import DROPOUT, LINEAR, Run
from .targets import ROOFLINE, outcomes

_MODES = ("forward", "backward", "both")
_HEADS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def markdown(run: Run) -> str:
    sections = [_head(run), _targets(run), _summary(run), "## Every measurement\n\n" + _legend(run)]
    for case in run.cases():
        sections += [f"### {case_title(case)}", _noise(run, case), _case_table(run, case)]
    return "\n\n".join(section for section in sections if section) + "\n"


def case_title(case: str) -> str:
    shape, dtype = case.rsplit("-", 1)
    return f"{shape.replace('x', ' x ')}, {dtype}"


def _head(run: Run) -> str:
    m = run.machine
    threads = "" if run.on_gpu else f", {m['threads']} threads"
    lines = [
        f"# Layer benchmark: {m['device']}{threads}",
        f"torch {m['torch']}, mixout_kernels {m['mixout_kernels']}, commit {run.commit.get('id', 'unknown')[:12]}"
        f"{' with local changes' if run.commit.get('dirty') else ''}, {run.date[:10]}.",
    ]
    if m["bytes_per_second"]:
        unit, scale = _flop_unit(run)
        peaks = ", ".join(f"{name} {rate / scale:.4g} {unit}" for name, rate in m["flops_per_second"].items())
        lines.append(f"Measured ceilings: copy {m['bytes_per_second'] / 1e9:.4g} GB/s; matmul {peaks}.")
    return "\n\n".join(lines)


def _targets(run: Run) -> str:
    rows = [
        [
            case_title(outcome.case) if outcome.target.case else f"every shape; worst: {case_title(outcome.case)}",
            outcome.target.variant,
            _HEADS[outcome.target.mode],
            outcome.target.baseline if outcome.target.baseline == ROOFLINE else _name(outcome.target.baseline),
            f"{outcome.target.limit:.2f}",
            "**wrong**" if outcome.ratio is None else f"{outcome.ratio:.2f}",
            "yes" if outcome.reached else "**no**",
        ]
        for outcome in outcomes(run)
    ]
    heads = ["rows x in x out", "layer", "time of", "ratio to", "at most", "measured", "reached"]
    return "## Targets\n\n" + _rows(heads, rows, left=4) if rows else ""


def _summary(run: Run) -> str:
    """Shapes across, layers down; a GPU run has too many shapes for that, its plot shows them."""
    cases = run.cases()
    if len(cases) > 8:
        return ""
    rows = [
        [_name(variant), *(_ratio_cell(run, case, variant, "both") for case in cases)]
        for variant in run.variants()
        if variant != LINEAR
    ]
    title = "## Forward + backward, time / nn.Linear"
    return f"{title}\n\n" + _rows(["layer", *(case_title(case) for case in cases)], rows, left=1)


def _legend(run: Run) -> str:
    unit, _ = _flop_unit(run)
    return (
        "Medians of interleaved rounds: every round takes one sample of every layer, in random order. `x` is the ratio "
        f"to nn.Linear in the same rounds. {unit}, GB/s and the share of the roofline are of forward + backward and "
        "count what the operation needs, whoever computes it: with a neuron mask dw is zero outside the kept columns. "
        "`saved` is what one forward keeps for backward, parameters and target aside. The reference check compares y, "
        "dx, dw and db with `mixout_kernels.reference` at the same seed; a layer that fails it gets no ratio."
    )


def _noise(run: Run, case: str) -> str:
    linear = run.entries[case, LINEAR, "both"]
    spread = (linear.quartiles[1] - linear.quartiles[0]) / linear.seconds
    warning = " **Too noisy: measure again on a quieter machine.**" if spread > 0.25 else ""
    return f"{linear.rounds} rounds; the quartiles of nn.Linear are {spread:.0%} of its median apart.{warning}"


def _case_table(run: Run, case: str) -> str:
    unit, scale = _flop_unit(run)
    heads = ["layer", "matches the reference"]
    for mode in _MODES:
        heads += [f"{_HEADS[mode]} ms", "x"]
    heads += ["x Dropout", unit, "GB/s", "roofline", "saved MB"]
    rows = []
    for variant in run.variants(case):
        entries = {mode: run.entries.get((case, variant, mode)) for mode in _MODES}
        main = entries["both"] or entries["forward"]
        assert main is not None  # each layer has a forward
        row = [_name(variant), {None: "-", True: "yes", False: "**NO**"}[main.info["matches_reference"]]]
        for mode, entry in entries.items():
            row += (
                ["-", "-"] if entry is None else [f"{entry.seconds * 1e3:.4g}", _ratio_cell(run, case, variant, mode)]
            )
        row += [
            _ratio_cell(run, case, variant, "both", DROPOUT),
            f"{main.info['gflop_per_second'] * 1e9 / scale:.4g}",
            f"{main.info['gbyte_per_second']:.3g}",
            f"{main.info['roofline_share']:.0%}",
            "-" if main.info["saved_bytes"] is None else f"{main.info['saved_bytes'] / 1e6:.3g}",
        ]
        rows.append(row)
    return _rows(heads, rows, left=2)


def _name(variant: str) -> str:
    return {LINEAR: "nn.Linear", DROPOUT: "Dropout(0.1) + nn.Linear"}.get(variant, variant)


def _flop_unit(run: Run) -> tuple[str, float]:
    return ("TFLOP/s", 1e12) if run.on_gpu else ("GFLOP/s", 1e9)


def _ratio_cell(run: Run, case: str, variant: str, mode: str, baseline: str = LINEAR) -> str:
    entry = run.entries.get((case, variant, mode))
    if entry is not None and entry.wrong:
        return "**wrong**"
    ratio = run.ratio(case, variant, mode, baseline)
    return "-" if ratio is None else f"{ratio:.2f}"


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are words and whose others are figures."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))
