"""Mixout's neighbours as variants of the job: masks on gradients, guided dropout, R3F."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

import mixout_kernels as mk

NeighbourKind = Literal["graddrop", "guided", "r3f", "childtuning-f", "childtuning-d"]
KEEP = 0.3  # of Child-Tuning, as published for its tasks

Batches = Iterable[Mapping[str, Tensor]]  # of the training split, with labels


def name_of(kind: NeighbourKind, p: float) -> str:
    return {
        "graddrop": f"GradDrop, p={p:g}",
        "guided": "guided dropout + weight decay",
        "r3f": "R3F + weight decay",
        "childtuning-f": f"Child-Tuning-F, keep {KEEP:g}",
        "childtuning-d": f"Child-Tuning-D, keep {KEEP:g}",
    }[kind]


def prepare(kind: NeighbourKind, model: nn.Module, p: float, batches: Batches) -> None:
    """Change a freshly loaded model, in place. Dropout stays as the checkpoint has it, as the authors left it."""
    _PREPARE[kind](model, p, batches)


def loss(kind: str, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Compute the cross entropy; with R3F's term, which the model adds where it is given the labels."""
    if kind == "r3f":
        return model(**inputs, labels=labels).loss
    return F.cross_entropy(model(**inputs).logits, labels)


def _graddrop(model: nn.Module, p: float, batches: Batches) -> None:
    mk.apply_graddrop(model, p=p)
    mk.MixSampler(model)


def _guided(model: nn.Module, p: float, batches: Batches) -> None:
    """The paper measures the Fisher information on the pretraining loss, for which this checkpoint has no head."""
    mk.apply_guided_dropout(model, mk.fisher(model, batches, mean=True, progress=False))


def _r3f(model: nn.Module, p: float, batches: Batches) -> None:
    mk.apply_r3f(model)


def _childtuning_f(model: nn.Module, p: float, batches: Batches) -> None:
    mk.apply_graddrop(model, p=1 - KEEP, mask="weight", exclude=())
    mk.MixSampler(model)


def _childtuning_d(model: nn.Module, p: float, batches: Batches) -> None:
    """Of the parameters whose name contains "layer", as the authors'; the square of each batch's gradient."""
    fisher = mk.fisher(model, batches, per="batch", include=["*layer*"], progress=False)
    mk.apply_graddrop(model, keep=mk.top_entries(fisher, keep=KEEP))


_PREPARE: dict[NeighbourKind, Callable[[nn.Module, float, Batches], None]] = {
    "graddrop": _graddrop,
    "guided": _guided,
    "r3f": _r3f,
    "childtuning-f": _childtuning_f,
    "childtuning-d": _childtuning_d,
}
NEIGHBOURS: tuple[NeighbourKind, ...] = tuple(_PREPARE)
