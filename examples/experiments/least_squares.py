r"""Least squares under mixout (supplement D, figure 5): what the penalty does where it can be written down.

A line y = a x + b is fitted by SGD under mixout towards another line u. For a quadratic loss the expectation over the
masks is exact:

    E L(Phi) = L(w) + p / (2 (1 - p)) * sum_j A_jj (w_j - u_j)^2          A = F^T F / n, the Hessian of L

Corollary 1.1 of the paper bounds it from below by strong convexity, with m the least eigenvalue of A:

    E L(Phi) >= L(w) + m p / (2 (1 - p)) * |w - u|^2

Both have a minimum in closed form, so that what training finds can be held against what they predict.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import mixout_kernels as mk

from .runs import Run, run_all

RATES = (0.0, 0.3, 0.6, 0.9)
TRUE_LINE, TARGET_LINE = (2.0, -1.0), (-1.0, 2.0)
POINTS, NOISE, DATA_SEED = 60, 0.5, 0


def data() -> tuple[Tensor, Tensor]:
    """Features (x, 1) and noisy values of the true line, in float64."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = 0.5 + torch.randn(POINTS, generator=generator, dtype=torch.float64)
    features = torch.stack([x, torch.ones_like(x)], 1)
    noise = NOISE * torch.randn(POINTS, generator=generator, dtype=torch.float64)
    return features, features @ torch.tensor(TRUE_LINE, dtype=torch.float64) + noise


def predicted(p: float, *, exact: bool) -> Tensor:
    """The minimum of the expected loss, or of Corollary 1.1's lower bound of it."""
    features, values = data()
    hessian = features.t() @ features / POINTS
    metric = hessian.diag().diag() if exact else torch.linalg.eigvalsh(hessian)[0] * torch.eye(2, dtype=torch.float64)
    penalty = p / (1 - p) * metric
    target = torch.tensor(TARGET_LINE, dtype=torch.float64)
    return torch.linalg.solve(hessian + penalty, features.t() @ values / POINTS + penalty @ target)


def train(p: float, seed: int, steps: int) -> Mapping[str, object]:
    """SGD with a fresh mask each step and a rate that falls as 1 / t; the mean of the second half of its iterates."""
    features, values = data()
    target = torch.tensor([TARGET_LINE], dtype=torch.float64)
    layer = mk.MixLinear(2, 1, bias=False, dtype=torch.float64, p=p, target=target)
    with torch.no_grad():
        layer.weight.copy_(target)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    curvature = 2 / (1 - p)  # a step of the inverse of the largest curvature that a mask can give is stable
    total = torch.zeros(1, 2, dtype=torch.float64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1 / (curvature / (1 - p) + step / 20)
        optimizer.zero_grad()
        (layer(features).squeeze(1) - values).square().mean().div(2).backward()
        optimizer.step()
        if step >= steps // 2:
            total += layer.weight.detach()
    return {"line": (total / (steps - steps // 2))[0].tolist()}


def distance(line: Tensor | list[float], other: tuple[float, float]) -> float:
    return (torch.as_tensor(line, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).norm().item()


def run(output: Path, *, quick: bool) -> str:
    """Trains, writes least-squares.png, and returns the page."""
    restarts, steps = (2, 200) if quick else (20, 4000)
    settings = [{"p": p, "seed": seed, "steps": steps} for p in RATES for seed in range(restarts)]
    runs = run_all(output / "least-squares.jsonl", settings, train)
    plot(runs, output / "least-squares.png")
    rows = [_row(p, [one["line"] for one in runs if one["p"] == p]) for p in RATES]
    return "\n".join(
        [
            "# Least squares (supplement D, figure 5)",
            "",
            f"{POINTS} points of y = {TRUE_LINE[0]} x + {TRUE_LINE[1]}, noise {NOISE} (seed {DATA_SEED}); target "
            f"y = {TARGET_LINE[0]} x + {TARGET_LINE[1]}; {restarts} restarts (seeds 0 to {restarts - 1}) of {steps} "
            "steps; mean and standard deviation over the restarts.",
            "",
            "| p | distance to the target: trained | exact minimum | minimum of Corollary 1.1's bound | "
            "distance to the true line: trained | exact minimum |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            "![the lines](least-squares.png)",
            "",
        ]
    )


def _row(p: float, lines: list[list[float]]) -> str:
    def measured(other: tuple[float, float]) -> str:
        found = [distance(line, other) for line in lines]
        return f"{statistics.mean(found):.3f} ± {statistics.pstdev(found):.3f}"

    exact, bound = predicted(p, exact=True), predicted(p, exact=False)
    return (
        f"| {p} | {measured(TARGET_LINE)} | {distance(exact, TARGET_LINE):.3f} | {distance(bound, TARGET_LINE):.3f} | "
        f"{measured(TRUE_LINE)} | {distance(exact, TRUE_LINE):.3f} |"
    )


def plot(runs: list[Run], path: Path) -> None:
    features, values = data()
    x = torch.linspace(features[:, 0].min().item(), features[:, 0].max().item(), 2)
    figure, panels = plt.subplots(1, len(RATES), figsize=(14, 3.6), sharey=True, layout="constrained")
    for panel, p in zip(panels, RATES, strict=True):
        panel.scatter(features[:, 0], values, s=8, color="0.7")
        for one in runs:
            if one["p"] == p:
                panel.plot(x, one["line"][0] * x + one["line"][1], color="tab:blue", alpha=0.25)
        exact = predicted(p, exact=True)
        panel.plot(x, exact[0] * x + exact[1], "k--", label="exact minimum of E L")
        panel.plot(x, TARGET_LINE[0] * x + TARGET_LINE[1], color="tab:red", label="target u")
        panel.plot([], [], color="tab:blue", label="trained, one line a restart")
        panel.set_title(f"mixout(u, {p})")
        panel.set_xlabel("x")
    panels[0].set_ylabel("y")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
