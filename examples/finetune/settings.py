"""The settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from benchmarks.common.errors import CommandError
from benchmarks.common.methods import Kind, Method
from mixout_kernels.draws import Mask

from . import neighbours
from .neighbours import NEIGHBOURS, Batches, NeighbourKind

Precision = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "eager"]

KINDS: tuple[Kind, ...] = ("dropout", "plain", "mixout")  # what is compared by default


@dataclass(frozen=True)
class Variant:
    """One way to regularise the same fine-tuning."""

    kind: Kind | NeighbourKind
    p: float = 0.0
    mask: Mask = "neuron"
    attention: Attention | None = None  # None: transformers' own choice

    @property
    def name(self) -> str:
        if self.kind in NEIGHBOURS:
            return neighbours.name_of(self.kind, self.p)
        return "dropout + weight decay" if self.kind == "dropout" else self._method.name

    @property
    def _method(self) -> Method:
        assert self.kind not in NEIGHBOURS
        return Method(self.kind, self.p, self.mask)

    def prepare(self, model: nn.Module, batches: Batches = ()) -> None:
        """Change a freshly loaded model, in place; ``batches`` are those of the training split, with labels."""
        try:
            if self.kind in NEIGHBOURS:
                neighbours.prepare(self.kind, model, self.p, batches)
            else:
                self._method.prepare(model)
        except ValueError as error:
            raise CommandError(str(error)) from None

    def weight_decay(self, rate: float) -> float:
        """Decay in the recipes that have nothing of their own: mixout pulls the weights to the pretrained ones.

        Child-Tuning-D has none either, since decay would move the entries that its mask keeps still.
        """
        return rate if self.kind in ("dropout", "guided", "r3f") else 0.0


@dataclass(frozen=True)
class Settings:
    model: Path | None = None  # None: the pinned MiniLM
    csv: Path | None = None  # None: the pinned rotten-tomatoes sentences
    test_csv: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    group_column: str | None = None
    test_fraction: float = 0.2
    train_size: int | None = None
    test_size: int | None = None
    validate: bool = False  # on rows held out from training, not on the test split
    variants: tuple[Variant, ...] = ()
    restarts: int = 3
    epochs: int = 3
    steps: int | None = None  # takes the place of epochs
    batch_size: int = 16
    max_length: int = 32
    # By --validate, three restarts of dropout, mixout p = 0.7 and p = 0.9: 82.1, 81.0 and 62.0 % at 5e-5; 81.4, 82.2
    # and 73.7 % at 1e-4; 81.0, 81.1 and 81.7 % at 2e-4, the best mean. Within three epochs p = 0.9 needs it.
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    precision: Precision = "float32"  # bfloat16: under autocast
    attention: Attention | None = None  # None: see ``attention.choose``
    seed: int = 0
    output: Path = Path("results/finetune")

    @property
    def held_out(self) -> str:
        """Name the split whose accuracies are reported."""
        return "validation" if self.validate else "test"
