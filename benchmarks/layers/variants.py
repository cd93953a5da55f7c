"""The layers that are compared: each is a function of ``Operands``, made when it is about to be measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import mixout_kernels as mk
from benchmarks.baselines import plain_mixout
from mixout_kernels import backends
from mixout_kernels.functional import Backend, Mask, Schedule

from .cases import Case, Operands
from .results import DROPOUT, LINEAR

Layer = Callable[[Operands], Tensor]
Target = Literal["pretrained", "zero"]


@dataclass(frozen=True)
class Variant:
    name: str
    provider: str
    make: Callable[[], Layer]
    p: float = 0.0
    mask: Mask | None = None  # None where no weight is mixed
    target: Target | None = None
    backend: Backend | None = None  # of this package: the one that runs
    schedule: Schedule | None = None  # None: what the package chooses
    has_backward: bool = True

    @property
    def ours(self) -> bool:
        return self.backend is not None

    def call(self, operands: Operands, seed: int | None) -> Tensor:
        """This package's layer, as ``make`` gives it, with a chosen seed."""
        assert self.mask is not None
        return mk.mix_linear(
            operands.x,
            operands.weight,
            None if self.target == "zero" else operands.target,
            operands.bias,
            p=self.p,
            mask=self.mask,
            seed=seed,
            backend=self.backend,
            schedule=self.schedule,
        )


def variants_for(case: Case, device: str) -> list[Variant]:
    """Every layer that can be measured here. The plain formula costs the same for every p, so it runs at one."""
    masks: tuple[Mask, ...] = ("neuron", "weight")
    found = [_linear(), _dropout()]
    found += [_plain(mask) for mask in masks]
    found += [_compiled(mask) for mask in masks]

    default = backends.choose(None, None, device, case.dtype, case.dtype, case.dtype)
    found += [_ours(mask, p, "pretrained", default) for mask in masks for p in (0.7, 0.9)]
    # Dropout of input features and dropconnect, at a rate they are used with and at mixout's.
    found += [_ours(mask, p, "zero", default) for mask in masks for p in (0.1, 0.9)]
    for backend in backends.PREFERENCE.get(device, ()):
        schedules = _schedules(backend, case, device)
        if len(schedules) > 1 or backend != default:
            for schedule in schedules:
                found.append(_ours("neuron", 0.9, "pretrained", backend, schedule))
                found.append(_ours("weight", 0.7, "pretrained", backend, schedule))
    if device == "cuda" and case.dtype_name == "bf16" and importlib.util.find_spec("quack") is not None:
        found.append(_quack())
    return found


def _schedules(backend: str, case: Case, device: str) -> tuple[Schedule, ...]:
    try:
        backends.choose(backend, None, device, case.dtype, case.dtype, case.dtype)
    except RuntimeError:
        return ()
    return backends.load(backend).schedules(case.dtype)


def _linear() -> Variant:
    return Variant(LINEAR, "nn.Linear", lambda: lambda o: F.linear(o.x, o.weight, o.bias))


def _dropout() -> Variant:
    def layer(o: Operands) -> Tensor:
        return F.linear(F.dropout(o.x, 0.1), o.weight, o.bias)

    return Variant(DROPOUT, "nn.Linear + Dropout", lambda: layer, p=0.1)


def _plain(mask: Mask) -> Variant:
    def layer(o: Operands) -> Tensor:
        return F.linear(o.x, plain_mixout(o.weight, o.target, 0.7, mask), o.bias)

    return Variant(f"plain-{mask}-p0.7", "plain formula", lambda: layer, 0.7, mask, "pretrained")


def _compiled(mask: Mask) -> Variant:
    def formula(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, plain_mixout(weight, target, 0.7, mask), bias)

    def make() -> Layer:
        # dynamic=False: a user's layer has one shape, and code for one shape is the faster one.
        compiled = torch.compile(formula, fullgraph=True, dynamic=False)
        return lambda o: compiled(o.x, o.weight, o.target, o.bias)

    return Variant(f"compiled-{mask}-p0.7", "torch.compile(formula)", make, 0.7, mask, "pretrained")


def _ours(mask: Mask, p: float, target: Target, backend: str, schedule: Schedule | None = None) -> Variant:
    parts = ["mixout", *([backend, schedule] if schedule else []), *(["zero"] if target == "zero" else []), mask]
    variant = Variant(
        name=f"{'-'.join(parts)}-p{p}",
        provider="mixout_kernels",
        make=lambda: lambda operands: variant.call(operands, seed=None),
        p=p,
        mask=mask,
        target=target,
        backend=cast(Backend, backend),
        schedule=schedule,
    )
    return variant


def _quack() -> Variant:
    def make() -> Layer:
        from .quack_dropout import dropout_linear

        return lambda o: dropout_linear(o.x, o.weight, o.bias, 0.1)

    return Variant("quack-dropout-p0.1", "quack dropout GEMM", make, p=0.1, has_backward=False)
