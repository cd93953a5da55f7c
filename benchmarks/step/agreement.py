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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from mixout_kernels import MixSampler, backends

from .training import Captured, Training


def matches_reference(training: Training) -> bool:
    """After a few steps, when the weights have left their targets."""
    return _close(_gradients(training), _reference_gradients(training), _exact_gradients(training))


def replay_matches_reference(captured: Captured) -> bool:
    """As near to the reference as the eager step, which is checked by itself: without another model in float64."""
    eager, reference = _gradients(captured.training), _reference_gradients(captured.training)
    # Last: a replay changes the weights.
    return _close(captured.gradients(), eager, reference)


def _close(ours: Mapping[str, Tensor], other: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> bool:
    """Whether ``ours`` is as near to ``truth`` as ``other``, by the rule above."""
    eps = torch.finfo(torch.float32).eps
    in_float64 = ((name, gradient.double()) for name, gradient in truth.items())
    rows = [[(ours[name] - u).norm(), (other[name] - u).norm(), u.norm()] for name, u in in_float64]
    norms = torch.tensor(rows, dtype=torch.float64)
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
    """Layers without a sampler draw their seeds from the default generator."""
    torch.manual_seed(0)
    training.optimizer.zero_grad()
    training.backward()
    return training.gradients()


def _reference_gradients(training: Training) -> dict[str, Tensor]:
    return _gradients_of_a_copy(training, copy.deepcopy(training.model), training.workload.autocast())


def _exact_gradients(training: Training) -> dict[str, Tensor]:
    return _gradients_of_a_copy(training, copy.deepcopy(training.model).double(), nullcontext())


def _gradients_of_a_copy(
    training: Training, model: nn.Module, precision: AbstractContextManager[object]
) -> dict[str, Tensor]:
    """Through the reference. A sampler keeps what the kernels have mixed, and compiled code calls them: not the copy's.

    The copy and its sampler are a cycle, for the garbage collector.
    """
    sampler = None
    if training.sampler is not None:
        sampler = MixSampler(model, premix=False)
        sampler.load_state_dict(training.sampler.state_dict())
    torch.manual_seed(0)
    with _reference_backend(), precision:
        loss = model(**training.batch).loss
    loss.backward()
    if sampler is not None:
        sampler.remove()  # its hook would be called in every optimizer step
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
