"""The layers that are compared: each is a function of ``Operands``, made when it is about to be measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import mixout_kernels as mk
from benchmarks.common.methods import plain_mixout
from benchmarks.common.rows import Fact
from mixout_kernels import backends
from mixout_kernels.draws import Mask
from mixout_kernels.functional import Backend, Schedule

from .cases import Case, Operands

LINEAR, DROPOUT = "linear", "dropout-p0.1"  # the layers that ratios are taken to
MASKS: tuple[Mask, ...] = ("neuron", "weight")

Call = Callable[[Operands], Tensor]


class Mix(NamedTuple):
    """The way in which a weight is mixed and its gradient masked."""

    mask: Mask
    p: float
    target: Literal["pretrained", "zero"] = "pretrained"
    grad_p: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        return {"mask": self.mask, "p": self.p, "grad_p": self.grad_p}

    def target_of(self, operands: Operands) -> Tensor | None:
        return operands.target if self.target == "pretrained" else None

    @property
    def name(self) -> str:
        return ("zero-" if self.target == "zero" else "") + f"{self.mask}-p{self.p}"


def graddrop(grad_p: float) -> Mix:
    """The weight itself in the product, and a part of its gradient: the target does not matter."""
    return Mix("neuron", 0.0, "zero", grad_p)


@dataclass(frozen=True)
class Layer:
    name: str
    provider: str
    make: Callable[[], Call]
    mix: Mix | None = None
    backend: Backend | None = None  # of this package: the one that runs
    schedule: Schedule | None = None  # None: what the package chooses
    has_backward: bool = True

    @property
    def ours(self) -> bool:
        return self.backend is not None

    def call(self, operands: Operands, seed: int | None = None) -> Tensor:
        """Call this package's layer, as ``make`` gives it, with a chosen seed."""
        assert self.mix is not None
        o, where = operands, {"backend": self.backend, "schedule": self.schedule}
        return mk.mix_linear(o.x, o.weight, self.mix.target_of(o), o.bias, **self.mix.options, seed=seed, **where)

    def facts(self) -> dict[str, Fact]:
        """Describe it in the columns of the CSV."""
        mix = self.mix._asdict() if self.mix else dict.fromkeys(Mix._fields)
        return {"provider": self.provider, "backend": self.backend, "schedule": self.schedule, **mix}


def layers_for(case: Case, device: str) -> list[Layer]:
    """List every layer that can be measured here. The plain formula costs the same for every p, so it runs at one."""
    found = [
        Layer(LINEAR, "nn.Linear", lambda: lambda o: F.linear(o.x, o.weight, o.bias)),
        Layer(DROPOUT, "nn.Linear + Dropout", lambda: lambda o: F.linear(F.dropout(o.x, 0.1), o.weight, o.bias)),
        *(_plain(Mix(mask, 0.7), compiled) for compiled in (False, True) for mask in MASKS),
    ]
    default = backends.choose(None, None, device, case.dtype, case.dtype, case.dtype)
    found += [_ours(Mix(mask, p), default) for mask in MASKS for p in (0.7, 0.9)]
    # Dropout of input features and dropconnect, at a rate they are used with and at mixout's.
    found += [_ours(Mix(mask, p, "zero"), default) for mask in MASKS for p in (0.1, 0.9)]
    found += [_ours(graddrop(grad_p), default) for grad_p in (0.5, 0.9)]
    for backend in backends.PREFERENCE.get(device, ()):
        schedules = _schedules(backend, case, device)
        if len(schedules) > 1 or backend != default:
            mixes = (Mix("neuron", 0.9), Mix("weight", 0.7))
            found += [_ours(mix, backend, schedule) for schedule in schedules for mix in mixes]
        if "staged" in schedules and len(schedules) > 1:
            found += [_ours(graddrop(grad_p), backend, "staged") for grad_p in (0.5, 0.9)]
    if device == "cuda" and case.dtype_name == "bf16" and importlib.util.find_spec("quack") is not None:
        found.append(Layer("quack-dropout-p0.1", "quack dropout GEMM", _quack, has_backward=False))
    return found


def _schedules(backend: str, case: Case, device: str) -> tuple[Schedule, ...]:
    try:
        backends.choose(backend, None, device, case.dtype, case.dtype, case.dtype)
    except RuntimeError:
        return ()
    return backends.load(backend).schedules(case.dtype)


def _plain(mix: Mix, compiled: bool) -> Layer:
    def formula(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, plain_mixout(weight, target, mix.p, mix.mask), bias)

    def make() -> Call:
        # dynamic=False: a user's layer has one shape, and code for one shape is the faster one.
        call = torch.compile(formula, fullgraph=True, dynamic=False) if compiled else formula
        return lambda o: call(o.x, o.weight, o.target, o.bias)

    kind, provider = ("compiled", "torch.compile(formula)") if compiled else ("plain", "plain formula")
    return Layer(f"{kind}-{mix.name}", provider, make, mix)


def _ours(mix: Mix, backend: str, schedule: Schedule | None = None) -> Layer:
    kind, what = ("graddrop", f"{mix.mask}-p{mix.grad_p}") if mix.grad_p else ("mixout", mix.name)
    name = "-".join([kind, *([backend, schedule] if schedule else []), what])
    layer = Layer(name, "mixout_kernels", lambda: layer.call, mix, cast(Backend, backend), schedule)
    return layer


def _quack() -> Call:
    from .quack_dropout import dropout_linear

    return lambda o: dropout_linear(o.x, o.weight, o.bias, 0.1)
