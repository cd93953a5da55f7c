"""What is compared: a way to train or to compute the Fisher information, ours or as published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mixout_kernels as mk
from benchmarks.common.methods import Method

from . import published

EPS = 1e-5  # of R3F, as published
KEEP = 0.3  # of Child-Tuning, as published

Batch = Mapping[str, Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


@dataclass(frozen=True)
class Step:
    """A training step. ``goal``: its time over that of ``baseline`` is to be at most so much."""

    name: str
    prepare: Callable[[nn.Module], object]
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss
    before_step: Callable[[nn.Module], object] | None = None
    ours: bool = True  # with masks that the reference has too, to compare with
    published: str | None = None
    goal: float | None = None
    baseline: str = "no regularisation"


def without_dropout(model: nn.Module) -> None:
    Method("none").prepare(model)


def _graddrop(p: float, mask: str, **options: object) -> Callable[[nn.Module], object]:
    def prepare(model: nn.Module) -> mk.MixSampler:
        without_dropout(model)
        mk.apply_graddrop(model, p=p, mask=mask, **options)
        return mk.MixSampler(model, seed=1)

    return prepare


def _fixed(model: nn.Module) -> None:
    without_dropout(model)
    mk.apply_graddrop(model, keep=_random_masks(model))


def _fixed_columns(model: nn.Module) -> None:
    without_dropout(model)
    mk.apply_graddrop(model, keep={name: mask[0] for name, mask in _random_masks(model).items() if mask.dim() == 2})


def _random_masks(model: nn.Module) -> dict[str, Tensor]:
    """Entries of the encoder's layers, as many as Child-Tuning-D keeps: which ones does not matter to the time."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(parameter.shape, generator=generator) < KEEP
        for name, parameter in model.named_parameters()
        if ".layer." in name
    }


def _multiply_fixed() -> Callable[[nn.Module], None]:
    masks: dict[str, Tensor] = {}

    def multiply(model: nn.Module) -> None:
        if not masks:
            masks.update({name: mask.float() for name, mask in _random_masks(model).items()})
        for name, parameter in model.named_parameters():
            if name in masks and parameter.grad is not None:
                parameter.grad *= masks[name]

    return multiply


def _r3f_with_mixout(model: nn.Module) -> mk.MixSampler:
    mk.apply_mixout(model, p=0.7)
    mk.apply_r3f(model, eps=EPS)
    return mk.MixSampler(model, seed=1)


def _hooked(p: float) -> Callable[[nn.Module], object]:
    def prepare(model: nn.Module) -> None:
        without_dropout(model)
        published.hook_linear_weights(model, p)

    return prepare


def steps() -> list[Step]:
    """List every training step, the two that ratios are taken to first."""
    hooks = "Bernoulli hooks on linear weights, p=0.5"
    child_f, child_d = f"Child-Tuning-F as published, keep {KEEP}", f"Child-Tuning-D as published, keep {KEEP}"
    forwards = "R3F with dropout, two forwards"
    found = [
        Step("no regularisation", without_dropout, ours=False),
        Step("dropout 0.1", lambda model: None, ours=False),
        Step(hooks, _hooked(0.5), ours=False),
        Step(child_f, without_dropout, before_step=lambda m: published.mask_like_child_tuning_f(m, KEEP), ours=False),
        Step(child_d, without_dropout, before_step=_multiply_fixed(), ours=False),
        Step(forwards, lambda model: None, lambda m, b: published.two_forwards(m, b, EPS), ours=False),
    ]
    found += [
        Step(f"GradDrop neuron, p={p}", _graddrop(p, "neuron"), published=hooks if p == 0.5 else None, goal=goal)
        for p, goal in ((0.5, 0.60), (0.7, 0.55), (0.9, 0.52))
    ]
    found += [
        Step("GradDrop weight, p=0.5", _graddrop(0.5, "weight"), published=hooks, goal=0.65),
        Step("GradDrop layer, p=0.5", _graddrop(0.5, "layer"), goal=0.60),
        Step(f"Child-Tuning-F, keep {KEEP}", _graddrop(1 - KEEP, "weight", exclude=()), published=child_f, goal=0.70),
        Step(f"Child-Tuning-D, keep {KEEP}", _fixed, ours=False, published=child_d),
        Step(f"fixed columns, keep {KEEP}", _fixed_columns, ours=False, published=child_d),
        Step("R3F with dropout", lambda model: mk.apply_r3f(model, eps=EPS), ours=False, published=forwards),
        Step(
            "R3F with mixout, p=0.7",
            _r3f_with_mixout,
            ours=False,
            published=forwards,
            goal=0.95,
            baseline="dropout 0.1",
        ),
    ]
    return found


@dataclass(frozen=True)
class FisherPass:
    """A way to compute the Fisher information of a batch. ``goal``: the loop takes at least so many times as long."""

    name: str
    compute: Callable[[nn.Module, Batch], object]
    ours: bool = False
    mean: bool = False
    goal: float | None = None


LOOP = "Fisher, loop over examples"


def fisher_passes() -> list[FisherPass]:
    def backward(model: nn.Module, batch: Batch) -> None:
        model.zero_grad()
        model_loss(model, batch).backward()
        model.zero_grad()

    return [
        FisherPass(LOOP, published.fisher_by_loop),
        FisherPass("one forward and backward of the batch", backward),
        FisherPass("mk.fisher", lambda m, b: mk.fisher(m, [b]), ours=True, goal=2.8),
        FisherPass("mk.fisher(mean=True)", lambda m, b: mk.fisher(m, [b], mean=True), ours=True, mean=True, goal=4.0),
    ]
