"""What a training step sends, and what a rank holds of targets, from the shapes of a model: arithmetic, no measurement.

    gradient bytes = b * (sum over mixed layers of out * kept(in) + everything else)
    kept(in)       = (1 - p) in, on a CPU; the kernels' fixed capacity (mean + 7 sigma, in steps of 16) on a GPU

An all-reduce of n bytes over R ranks sends 2 (R - 1) / R n from each, an all-gather or a reduce-scatter (R - 1) / R n.
DDP has one all-reduce of the gradients a step. FSDP2 gathers the weights for forward and again for backward, and
reduce-scatters the gradients: three times (R - 1) / R n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common.report import table
from mixout_kernels.draws import column_capacity

RATES = (0.7, 0.9)
Shape = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """The mixed layers ``[out, in]`` of a model, and how many other Parameters it has."""

    name: str
    mixed: Sequence[Shape]
    rest: int

    @property
    def mixed_total(self) -> int:
        return sum(out * into for out, into in self.mixed)

    @property
    def total(self) -> int:
        return self.mixed_total + self.rest

    def kept(self, width: Callable[[int, float], float], p: float) -> float:
        """The share of all Parameters that is left when each mixed weight has ``width(in, p)`` columns."""
        return (sum(out * width(into, p) for out, into in self.mixed) + self.rest) / self.total


def bert(name: str, hidden: int, inner: int, layers: int, vocabulary: int = 30522, positions: int = 512) -> Shapes:
    """Query, key, value, their output, the two of the feed-forward, and the pooler; embeddings, biases and norms."""
    mixed = [*[(hidden, hidden)] * 4 * layers, *[(inner, hidden)] * layers, *[(hidden, inner)] * layers]
    biases_and_norms = layers * (9 * hidden + inner) + 3 * hidden
    return Shapes(name, [*mixed, (hidden, hidden)], (vocabulary + positions + 2) * hidden + biases_and_norms)


def llama(name: str, hidden: int, inner: int, layers: int, vocabulary: int, key_value: int) -> Shapes:
    """Query and output, key and value, gate, up and down; embedding, norms, and a head of its own, which is new."""
    mixed = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    mixed += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return Shapes(name, mixed * layers, 2 * vocabulary * hidden + (2 * layers + 1) * hidden)


MODELS = (
    bert("MiniLM-L6-H384", 384, 1536, 6),
    bert("BERT-large", 1024, 4096, 24),
    llama("Llama-2-7B", 4096, 11008, 32, 32000, 4096),
    llama("Llama-3-8B", 4096, 14336, 32, 128256, 1024),
)


def exact(into: int, p: float) -> float:
    return into * (1 - p)


def tables() -> str:
    """Lay out the shares for every model, and the bytes of a 7B model on 8 GPUs."""
    return f"{shares()}\n\n{example(MODELS[2], ranks=8, itemsize=2)}"


def shares() -> str:
    heads = ["model", "parameters", "mixed", "p", "DDP", "on a GPU", "FSDP2, kept reduce-scatter"]
    heads += ["on a GPU", "and kept all-gather", "on a GPU"]
    lines = []
    for model in MODELS:
        for p in RATES:
            found = [model.kept(width, p) for width in (exact, column_capacity)]
            line = [model.name, f"{model.total / 1e6:.0f}M", f"{model.mixed_total / model.total:.1%}", f"{p}"]
            line += [f"{share:.2f}" for share in found]
            line += [f"{(2 + share) / 3:.2f}" for share in found]
            lines.append([*line, *(f"{share:.2f}" for share in found)])
    return table(heads, lines)


def example(model: Shapes, ranks: int, itemsize: int) -> str:
    """Lay out what a rank sends in a step and holds of targets, in GB."""
    part = (ranks - 1) / ranks
    parameters, mixed = model.total * itemsize / 1e9, model.mixed_total * itemsize / 1e9
    lines = [
        ["DDP", f"{2 * part * parameters:.1f}", f"{mixed:.1f}"],
        ["FSDP2, whole targets", f"{3 * part * parameters:.1f}", f"{mixed:.1f}"],
        ["FSDP2, sharded targets", f"{3 * part * parameters:.1f}", f"{mixed / ranks:.1f}"],
    ]
    for p in RATES:
        share = model.kept(column_capacity, p)
        lines += [
            [f"DDP, kept columns, p={p}", f"{2 * part * share * parameters:.1f}", f"{mixed:.1f}"],
            [f"FSDP2, kept reduce-scatter, p={p}", f"{part * (2 + share) * parameters:.1f}", f"{mixed / ranks:.1f}"],
            [f"FSDP2, and kept all-gather, p={p}", f"{3 * part * share * parameters:.1f}", f"{mixed:.1f}"],
        ]
    head = f"{model.name}, {itemsize} bytes a number, {ranks} GPUs: {parameters:.1f} GB of weights"
    return table([head, "GB sent a step, each", "GB of targets, each"], lines)
