"""The page and the figure of the stability experiment, out of its finished runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.report import BLUES, GREY, ORANGE, table, tidy

from . import finetuning, rates
from .intervals import FEWEST, difference, share, spread_ratio
from .rates import accuracy_of
from .runs import Run
from .stability import BASELINE, Results, Stage, is_degenerate, paired

PROTOCOL = f"""\
MiniLM is fine-tuned on sentences of film reviews: three epochs in batches of 16 sentences of at most 32 tokens, fused
AdamW, warm-up over a tenth of the steps and linear decay, float32, one thread a run. It is tested on
{finetuning.FULL.rows} sentences of other films. The sentences are the same in all restarts; all strategies of a
restart have the same head and the same batches. GradDrop, guided dropout and R3F, as `examples.finetune` has them,
keep the model's dropout of 0.1; wdecay(w_pre) and mixout stand in its place, as in the paper. Weight decay is 0.01 to
zero for dropout(0.1), guided dropout and R3F, and 0 elsewhere. Mixout comes with a `MixSampler`. Torch's AdamW corrects
the bias of its moments. BERT's own optimizer does not, which Zhang et al. (*Revisiting few-sample BERT fine-tuning*,
ICLR 2021) hold for a cause of runs that fail.

Embeddings of tokens that occur in none of the sentences are left out of the model. This changes no result: no batch
reads them.
"""

COLUMNS = """\
## What the columns say

Degenerate: the loss is no longer finite, or the accuracy is less than two points above the share of the most frequent
label; with the exact 95 % interval of that probability. A run that failed counts with that share in means. The points
above dropout(0.1), wdecay(0, 0.01), and the ratio of the standard deviations to its, are taken in pairs, restart by
restart, each with the 95 % percentile interval of 10,000 bootstrap resamples of restarts (seed 0): bold where it
excludes zero, left out for fewer than five restarts. Each interval is for its own line: nothing is corrected for the
number of lines. The intervals are about other heads, batches and masks, not about other sentences.
"""


def page(results: Results) -> str:
    stages = (_stage(stage, runs) for stage, runs in results.restarts.items())
    figure = "![distribution of the test accuracy by strategy](stability.png)\n"
    head = "# Stability (section 5, figure 3, table 1)\n"
    return "\n".join([head, PROTOCOL, _rates(results.means), COLUMNS, *stages, figure])


def _rates(means: rates.Means) -> str:
    budget = rates.FULL
    tried = sorted({rate for of in means.values() for rate in of})
    rows = [[strategy, *(_bold(of, rate) if rate in of else "" for rate in tried)] for strategy, of in means.items()]
    said = (
        f"Mean accuracy on {budget.rows} validation sentences after training on {rates.SIZE} others, seeds "
        f"{', '.join(map(str, budget.seeds))}. Every strategy tries {', '.join(f'{rate:g}' for rate in budget.grid)}, "
        "and doubles or halves for as long as its best rate is at an edge. The best one, in bold, is used below; of "
        "equal ones the lower. Strategies that are not listed have not finished this yet."
    )
    return "\n".join(["## Learning rates", "", said, "", table(["strategy", *map("{:g}".format, tried)], rows), ""])


def _bold(means: Mapping[float, float], rate: float) -> str:
    text = f"{means[rate]:.1%}"
    return f"**{text}**" if rate == rates.best(means) else text


def _stage(stage: Stage, runs: Mapping[str, Sequence[Run]]) -> str:
    heads = ["strategy", "rate", "restarts", "mean (max)", "sd", "degenerate", "points above dropout", "sd ratio"]
    rows = [_row(name, of, runs.get(BASELINE, ())) for name, of in runs.items() if of]
    text = table(heads, rows) if rows else f"None of {finetuning.FULL.restarts} restarts is finished yet."
    return "\n".join([f"## {stage.title}", "", text, ""])


def _row(name: str, runs: Sequence[Run], baseline: Sequence[Run]) -> list[str]:
    values = [accuracy_of(run) for run in runs]
    degenerate = sum(map(is_degenerate, runs))
    chance = share(degenerate, len(runs))
    above, ratio = None, None
    if name != BASELINE:
        above, ratio = difference(*paired(runs, baseline)), spread_ratio(*paired(runs, baseline))
    return [
        name,
        f"{runs[0]['rate']:g}",
        f"{len(runs)} of {finetuning.FULL.restarts}",
        f"{statistics.fmean(values):.1%} ({max(values):.1%})",
        f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else "-",
        f"{degenerate} ({chance.low:.0%} to {chance.high:.0%})",
        "-" if above is None else above.in_points,
        "-" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
    ]


def draw(results: Results, path: Path) -> None:
    """The distributions as in figure 3: a violin of each strategy, a dot for each restart, a bar for the mean."""
    stages = [stage for stage, runs in results.restarts.items() if any(runs.values())]
    strategies = list(results.means)
    width, height = 3 + 3.4 * max(1, len(stages)), 1.2 + 0.4 * len(strategies)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    panels = figure.subplots(1, max(1, len(stages)), sharey=True, squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=False):
        runs = results.restarts[stage]
        for name, of in runs.items():
            if of:
                _distribution(panel, strategies.index(name), [100 * accuracy_of(run) for run in of], _colour(name))
        majority = next(run["majority"] for of in runs.values() for run in of)
        panel.axvline(100 * majority, color="black", linewidth=1, linestyle=":")
        panel.set_title(stage.title, fontsize=10)
        panel.set_xlabel("test accuracy, % (dotted: the most frequent label)", fontsize=8)
        tidy(panel)
    panels[0].set_yticks(range(len(strategies)), strategies)
    panels[0].set_ylim(len(strategies) - 0.4, -0.6)
    figure.savefig(path, format="png")


def _distribution(panel: Axes, place: int, percent: Sequence[float], colour: str) -> None:
    if len(percent) >= FEWEST and len(set(percent)) > 1:
        for body in panel.violinplot(percent, [place], orientation="horizontal", showextrema=False)["bodies"]:
            body.set(facecolor=colour, alpha=0.25)
    spread = 0.2 if len(percent) > 1 else 0.0
    panel.scatter(percent, place + np.linspace(-spread, spread, len(percent)), color=colour, s=11, linewidths=0)
    panel.plot([statistics.fmean(percent)] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=2)


def _colour(strategy: str) -> str:
    if strategy.startswith("mixout"):
        return BLUES[0]
    return GREY if strategy == BASELINE or strategy.startswith("wdecay") else ORANGE
