"""A run as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.finetune.plot import BLUES, GREY, ORANGE

from .measurement import STEPS_ON_GPU, Measurement
from .workload import Workload

matplotlib.use("Agg")


class Report:
    def __init__(self, workload: Workload, machine: dict[str, str | int], found: Sequence[Measurement]) -> None:
        self.workload, self.machine, self.found = workload, machine, found
        self.on_gpu = workload.device == "cuda"
        self.dropouts = {measurement.mode: measurement for measurement in found if measurement.kind == "dropout"}
        self.dropout = self.dropouts["eager"]

    def write(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{'gpu' if self.on_gpu else 'cpu'}{suffix}" for suffix in (".json", ".md", ".png")]
        paths[0].write_text(json.dumps(self._as_json(), indent=1) + "\n")
        paths[1].write_text(self.markdown() + "\n")
        self._plot().savefig(paths[2], format="png")
        return paths

    def ratio(self, measurement: Measurement, mode: str = "eager") -> float | None:
        """Of medians, to dropout in this mode; None for a step that does not match the reference."""
        dropout = self.dropouts.get(mode)
        if dropout is None or measurement.matches_reference is False:
            return None
        return measurement.median / dropout.median

    def _as_json(self) -> dict[str, object]:
        rows = [
            {
                **asdict(m),
                "median_ms": m.median,
                "quartiles_ms": m.quartiles,
                "ratio_to_dropout": self.ratio(m),
                "ratio_to_dropout_run_alike": self.ratio(m, m.mode),
            }
            for m in self.found
        ]
        return {"workload": self.workload.description, "machine": self.machine, "variants": rows}

    def markdown(self) -> str:
        heads = ["step", "matches the reference", "ms", "quartiles", "x dropout"]
        heads += ["x dropout run alike"] if self.on_gpu else []
        heads += ["peak MiB", "saved MiB", "targets MiB", "Phi MiB", *(["launches"] if self.on_gpu else [])]
        rows = []
        for m in self.found:
            row = [m.variant, {None: "-", True: "yes", False: "**NO**"}[m.matches_reference]]
            row += [f"{m.median:.1f}", "{:.1f} - {:.1f}".format(*m.quartiles), _ratio_text(self.ratio(m))]
            row += [_ratio_text(self.ratio(m, m.mode))] if self.on_gpu else []
            row += [_mebibytes(m.peak_bytes), _mebibytes(m.saved_bytes)]
            row += [_mebibytes(m.target_bytes or None), _mebibytes(m.mixed_bytes or None)]
            rows.append([*row, *([str(m.launches or "-")] if self.on_gpu else [])])
        rule = ["---" if i < 2 else "---:" for i in range(len(heads))]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))
        return f"# A training step: {self.workload.description}\n\n{self._goals()}{table}\n\n{self._notes()}"

    def _goals(self) -> str:
        lines = []
        for p, limit in self.workload.goals.items():
            for m in self.found:
                if m.kind == "sampler" and m.p == p and m.mode != "compiled":
                    ratio = self.ratio(m, m.mode)
                    reached = ratio is not None and ratio <= limit
                    graph, dropout = (", CUDA graph", "dropout in one") if m.mode == "graph" else ("", "dropout")
                    lines.append(
                        f"- p={p:g}{graph}: {_ratio_text(ratio)} x {dropout}, to reach at most {limit:.2f}: "
                        f"{'yes' if reached else '**no**'}"
                    )
        return "\n".join([*lines, "", ""]) if lines else ""

    def _notes(self) -> str:
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items() if name != "time")
        peak = (
            "torch.cuda.max_memory_allocated above what was allocated before"
            if self.on_gpu
            else "rise of the resident memory of a fresh process that trains this variant alone, from before its model "
            "is loaded (not measured where a compiler would be part of it)"
        )
        rounds = len(self.dropout.milliseconds)
        sample = f"{STEPS_ON_GPU} steps in a row" if self.on_gpu else "one step"
        return "\n".join(
            [
                f"- Medians of {rounds} rounds; every round takes {sample} of each variant, in random order. A step is "
                "zero_grad, forward, backward and optimizer.",
                "- The plain formula and its compiled form cost the same for every p.",
                f"- Peak: {peak}.",
                "- Saved: what one forward keeps for backward; weights, targets and Phi aside. Phi: the mixed weights "
                "that the sampler keeps.",
                *(self._notes_on_gpu() if self.on_gpu else []),
                "- The reference check compares all gradients with mixout_kernels.reference under the same masks; a "
                "step that fails it gets no ratio.",
                *([] if self.workload.goals else ["- A smoke test on a tiny model: its times say nothing."]),
                f"- {machine}.",
            ]
        )

    def _notes_on_gpu(self) -> list[str]:
        return [
            "- x dropout: to the first row. x dropout run alike: to the step with dropout that is eager, compiled or a "
            "CUDA graph as well. The goals are of the latter.",
            "- Saved counts the casts of weights that nn.Linear keeps under autocast. Phi, which takes their place, is "
            "not in it.",
            "- CUDA graph: the whole step, with the optimizer's part and the sampler's, in one launch. It trains the "
            "weights of its eager row: their peak is not measured twice.",
        ]

    def _plot(self) -> Figure:
        figure = Figure(figsize=(12, 1.6 + 0.42 * len(self.found)), layout="constrained", dpi=130)
        time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
        for place, m in enumerate(self.found):
            colour = self._colour(m)
            low, high = m.quartiles
            error = [[m.median - low], [high - m.median]]
            time.barh(place, m.median, height=0.65, color=colour, xerr=error, error_kw={"ecolor": "black", "lw": 1})
            time.annotate(
                f"  {m.median:.0f} ms ({_ratio_text(self.ratio(m))} x)",
                (high, place),
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
            if m.peak_bytes is not None:
                mebibytes = m.peak_bytes / 2**20
                memory.barh(place, mebibytes, height=0.65, color=colour)
                memory.annotate(f" {mebibytes:.0f}", (mebibytes, place), va="center", fontsize=9)
            else:
                memory.annotate(" not measured", (0, place), va="center", fontsize=9, color=GREY)
        for p, limit in self.workload.goals.items():
            time.axvline(limit * self.dropout.median, color="black", linewidth=0.8, linestyle=(0, (4 * p, 3)))
            time.annotate(
                f"goal, p={p:g}",
                (limit * self.dropout.median, -0.55),
                ha="right" if p == max(self.workload.goals) else "left",
                va="bottom",
                fontsize=8,
            )
        time.set_xlabel("milliseconds a step (median, quartiles; ratio to dropout)")
        memory.set_xlabel("peak memory, MiB")
        time.set_yticks(range(len(self.found)), [m.variant for m in self.found])
        time.set_ylim(len(self.found) - 0.4, -0.6)
        _tidy(time)
        _tidy(memory)
        figure.suptitle(self.workload.description, fontsize=11)
        return figure

    def _colour(self, measurement: Measurement) -> str:
        if measurement.kind in ("dropout", "none"):
            return GREY
        if measurement.kind == "plain":
            return ORANGE
        return BLUES[0] if measurement.p == 0.7 else BLUES[1]


def _tidy(axes: Axes) -> None:
    axes.margins(x=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _ratio_text(ratio: float | None) -> str:
    return "**wrong**" if ratio is None else f"{ratio:.3f}"
