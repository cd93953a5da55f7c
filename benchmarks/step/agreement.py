"""Does a step compute what the reference computes? A speed-up with a wrong gradient is none.

    |ours - truth| <= 2 |reference - truth| + 4 eps |truth|        for every gradient, in the 2-norm

``reference`` is the same step through ``mixout_kernels.reference``, in the same precision, ``truth`` in float64; all
three under the same masks. eps is the spacing of the dtype that the step computes in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixout_kernels import MixSampler, backends

from .training import Training

BAND = 4


def matches_reference(training: Training) -> bool:
    """After a few steps, when the weights have left their targets."""
    ours = _gradients(training)
    with _reference_backend():
        reference = _gradients(training)
    eps = torch.finfo(training.workload.low or torch.float32).eps
    truth = _exact_gradients(training)
    for name, exact in truth.items():
        error, allowed = (ours[name] - exact).norm(), 2 * (reference[name] - exact).norm()
        if not error <= allowed + BAND * eps * exact.norm():
            return False
    return True


@contextmanager
def _reference_backend() -> Iterator[None]:
    choose = backends.choose
    backends.choose = lambda *_: "reference"
    try:
        yield
    finally:
        backends.choose = choose


def _gradients(training: Training) -> dict[str, Tensor]:
    """In float64. Layers without a sampler draw their seeds from the default generator."""
    torch.manual_seed(0)
    training.optimizer.zero_grad()
    training.loss().backward()
    found = {name: p.grad.double() for name, p in training.model.named_parameters() if p.grad is not None}
    training.optimizer.zero_grad()
    return found


def _exact_gradients(training: Training) -> dict[str, Tensor]:
    model = copy.deepcopy(training.model).double()
    if training.sampler is not None:
        MixSampler(model, premix=False).load_state_dict(training.sampler.state_dict())
    torch.manual_seed(0)
    with _reference_backend():
        model(**training.batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
