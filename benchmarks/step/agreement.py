"""Does a step compute what the reference computes? A speed-up with a wrong gradient is none.

    |ours - truth| <=  2 |reference - truth| +  4 eps |truth|        the gradient of the whole model, in the 2-norm
    |ours - truth| <= 16 |reference - truth| + 64 eps |truth|        the gradient of every parameter

``reference`` is the same step through ``mixout_kernels.reference``, in the same precision, ``truth`` in float64; all
three under the same masks. eps is float32's, also under autocast: what a lower precision costs, the reference's error
has in it. A parameter of two numbers (the bias of a head) has two rounding errors, and the reference's are far below
their size now and then: the quotient of two normal variables passes 2 three times in ten. Summed over a model, chance
is gone. A step in float32 that scales dw by 1.001 fails, one under bfloat16 autocast that scales it by 1.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixout_kernels import MixSampler, backends

from .training import Training


def matches_reference(training: Training) -> bool:
    """After a few steps, when the weights have left their targets."""
    ours = _gradients(training)
    with _reference_backend():
        reference = _gradients(training)
    eps = torch.finfo(torch.float32).eps
    truth = _exact_gradients(training)
    pairs = [(ours[name] - exact, reference[name] - exact, exact) for name, exact in truth.items()]
    norms = torch.tensor([[t.norm() for t in triple] for triple in pairs], dtype=torch.float64)
    return _within(norms.norm(dim=0), 2, 4 * eps) and all(_within(row, 16, 64 * eps) for row in norms)


def _within(norms: Tensor, factor: float, share: float) -> bool:
    ours, reference, truth = norms.tolist()
    return ours <= factor * reference + share * truth  # false for a NaN


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
    training.backward()
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
