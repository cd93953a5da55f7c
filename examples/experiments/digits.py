"""A pair of digit tasks (section 4, figure 2): how far fine-tuning goes from what was pretrained, and what it forgets.

The paper's 784-300-100-10 net with layer normalisation is pretrained on MNIST, with dropout 0.1, weight decay 0.01,
warm-up and linear decay, and fine-tuned on a few digits of another source with mixout(w_pre, p) or dropout(p).

Other than in the paper: the pair is MNIST and the 8 x 8 digits of scikit-learn in place of EMNIST and MNIST, because no
package index carries EMNIST; the small digits are scaled to 20 x 20 and padded to 28 x 28, as MNIST was made; and 200
of them are trained on.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mixout_kernels as mk
from benchmarks.common import assets

from .runs import Run, run_all

RATES = [round(0.1 * k, 1) for k in range(10)]
STRATEGIES = ("mixout", "dropout")
LABELLED, BATCH, RATE = 200, 20, 1e-3
MEASURES = {
    "squared distance to w_pre": "squared_distance",
    "target accuracy": "target_accuracy",
    "source accuracy": "source_accuracy",
}


class Net(nn.Sequential):
    """784-300-100-10; dropout before the second and the third layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((784, 300), (300, 100)):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(100, 10))


Data = tuple[Tensor, Tensor]


@functools.cache
def mnist(cache: Path) -> tuple[Data, Data]:
    """Images ``[n, 784]`` in [0, 1] and labels: 60,000 to train on, 10,000 to test on."""

    def read(name: str, header: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(assets.mnist_file(cache, name), np.uint8, offset=header).copy())

    def pair(part: str) -> Data:
        images = read(f"{part}-images-idx3-ubyte", 16).reshape(-1, 784)
        return images / 255.0, read(f"{part}-labels-idx1-ubyte", 8).long()

    return pair("train"), pair("t10k")


@functools.cache
def small_digits() -> Data:
    """The 1,797 digits of scikit-learn as MNIST images: 8 x 8 scaled to 20 x 20, padded to 28 x 28."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    images = F.pad(F.interpolate(images, size=20, mode="bilinear", align_corners=False), (4, 4, 4, 4))
    return images.reshape(len(images), 784), torch.from_numpy(found.target).long()


@functools.cache
def pretrained(cache: Path, steps: int) -> Net:
    """The net after ``steps`` steps of 128 images; the same for all restarts, as in the paper."""
    (images, labels), _ = mnist(cache)
    torch.manual_seed(0)
    net = Net(dropout=0.1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    _train(net, optimizer, images, labels, steps, 128, seed=0)
    return net.eval()


def fine_tune(
    strategy: str, p: float, restart: int, steps: int, pretraining_steps: int, cache: Path
) -> Mapping[str, float]:
    """One restart: its own 200 digits, order of batches and masks, the same for both strategies and every p."""
    source, net = pretrained(cache, pretraining_steps), Net(dropout=p if strategy == "dropout" else 0.0)
    net.load_state_dict(source.state_dict())
    images, labels = small_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(restart))
    chosen, rest = order[:LABELLED], order[LABELLED:]
    torch.manual_seed(restart)
    if strategy == "mixout":
        mk.apply_mixout(net, p=p, exclude=())
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    _train(net, optimizer, images[chosen], labels[chosen], steps, BATCH, seed=restart)
    net.eval()
    weights = zip(net.state_dict().values(), source.state_dict().values(), strict=True)
    return {
        "squared_distance": sum((w - u).square().sum().item() for w, u in weights),
        "target_accuracy": _accuracy(net, images[rest], labels[rest]),
        "source_accuracy": _accuracy(net, *mnist(cache)[1]),
    }


def _train(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int
) -> None:
    net.train()
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for rows in _batches(len(images), batch, steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()


def _batches(rows: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        for batch in torch.randperm(rows, generator=generator).split(size)[:steps]:
            yield batch
            steps -= 1


@torch.inference_mode()
def _accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (net(images).argmax(1) == labels).float().mean().item()


def run(output: Path, *, quick: bool) -> str:
    """Pretrain once, fine-tune every strategy, rate and restart, write digits.png, and return the page."""
    restarts, steps, pretraining_steps = (1, 20, 50) if quick else (10, 400, 4700)
    settings = [
        {"strategy": strategy, "p": p, "restart": restart, "steps": steps, "pretraining_steps": pretraining_steps}
        for p in (RATES[::3] if quick else RATES)
        for strategy in STRATEGIES
        for restart in range(restarts)
    ]
    cache = assets.cache_folder()
    runs = run_all(output / "digits.jsonl", settings, functools.partial(fine_tune, cache=cache))
    plot(runs, output / "digits.png")
    net = pretrained(cache, pretraining_steps)
    before = _accuracy(net, *mnist(cache)[1]), _accuracy(net, *small_digits())
    rows = [
        f"| {strategy} | {p} | "
        + " | ".join(_mean_and_deviation(runs, strategy, p, key) for key in MEASURES.values())
        + " |"
        for strategy in STRATEGIES
        for p in sorted({one["p"] for one in runs})
    ]
    return "\n".join(
        [
            "# A pair of digit tasks (section 4, figure 2)",
            "",
            f"Pretrained for {pretraining_steps} steps of 128 on MNIST (seed 0): {before[0]:.2%} on its 10,000 test "
            f"images, {before[1]:.2%} on the 1,797 small digits before fine-tuning. Fine-tuned for {steps} steps of "
            f"{BATCH} on {LABELLED} small digits, tested on the others: AdamW, rate {RATE}, no weight decay, 10 % "
            f"warm-up, linear decay. {restarts} restarts (seeds 0 to {restarts - 1}), mean ± standard deviation.",
            "",
            f"| strategy | p | {' | '.join(MEASURES)} |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            "![distance, target and source accuracy](digits.png)",
            "",
        ]
    )


def _values(runs: list[Run], strategy: str, p: float, key: str) -> list[float]:
    return [one[key] for one in runs if one["strategy"] == strategy and one["p"] == p]


def _mean_and_deviation(runs: list[Run], strategy: str, p: float, key: str) -> str:
    values = _values(runs, strategy, p, key)
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    return f"{mean:.2f} ± {deviation:.2f}" if key == "squared_distance" else f"{mean:.1%} ± {deviation:.1%}"


def plot(runs: list[Run], path: Path) -> None:
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(13, 3.8), layout="constrained")
    rates = sorted({one["p"] for one in runs})
    for panel, (title, key) in zip(panels, MEASURES.items(), strict=True):
        for strategy, label in zip(STRATEGIES, ("mixout(w_pre, p)", "dropout(p)"), strict=True):
            values = [_values(runs, strategy, p, key) for p in rates]
            means = np.array([statistics.mean(v) for v in values])
            deviations = np.array([statistics.pstdev(v) for v in values])
            panel.plot(rates, means, marker="o", markersize=3, label=label)
            panel.fill_between(rates, means - deviations, means + deviations, alpha=0.2)
        panel.set_title(title)
        panel.set_xlabel("p")
    panels[0].set_yscale("log")
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
