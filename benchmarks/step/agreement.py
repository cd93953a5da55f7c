"""The gradients of a step against those of the same step through ``mixout_kernels.reference``."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor

import mixout_kernels as mk
from benchmarks.common.agreement import Verdict, compare_model

from .training import Captured, Training

# The rows of the batch are a few micro-batches in float64: all at once their activations are what needs most memory.
MICRO_BATCHES = 4


def check(training: Training) -> Verdict:
    """Compare after a few steps, when the weights have left their targets."""
    ours, reference = training.fresh_gradients(), _reference_gradients(training, exact=False)
    return compare_model(ours, reference, _reference_gradients(training, exact=True))


def check_replay(captured: Captured) -> Verdict:
    """Compare with the eager step, which is checked by itself: without another model in float64."""
    eager, reference = captured.training.fresh_gradients(), _reference_gradients(captured.training, exact=False)
    # Last: a replay changes the weights.
    return compare_model(captured.fresh_gradients(), eager, reference)


def _reference_gradients(training: Training, exact: bool) -> dict[str, Tensor]:
    """Take the gradients of a copy of the model, in the precision of the step or in float64.

    A sampler keeps what the kernels have mixed, and compiled code calls them: not the copy's. The copy and its sampler
    are a cycle, for the garbage collector.
    """
    model = copy.deepcopy(training.model)
    model = model.double() if exact else model
    sampler = None
    if training.sampler is not None:
        sampler = mk.MixSampler(model, premix=False)
        sampler.load_state_dict(training.sampler.state_dict())
    rows = training.workload.rows
    size = rows // MICRO_BATCHES if exact and rows % MICRO_BATCHES == 0 else rows
    variant = training.variant
    precision = nullcontext() if exact else variant.autocast(training.workload.device)
    with mk.kernels(backend="reference"), variant.matmul_precision(), precision:
        for start in range(0, rows, size):
            torch.manual_seed(0)  # the same masks for all
            batch = {name: values[start : start + size] for name, values in training.batch.items()}
            (model(**batch).loss * (size / rows)).backward()
    if sampler is not None:
        sampler.remove()  # its hook would be called in every optimizer step
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
