"""A variant in training, one step at a time, and what a step keeps in memory; the step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import clocks, memory

from .variants import Variant
from .workload import WORKLOADS, Workload

# The first step makes Adam's state and mixes layer by layer, the second runs in the memory that stays.
WARMUP_STEPS = 3


class Training:
    def __init__(self, workload: Workload, variant: Variant) -> None:
        self.workload, self.variant = workload, variant
        self.model = workload.model(variant.attention)
        variant.prepare(self.model)
        self.sampler = variant.sampler(self.model)
        self.batch = workload.batch()
        # capturable: so that a CUDA graph can hold the same step; the fused kernel does the same either way.
        capturable = workload.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True, capturable=capturable)
        # dynamic=False: the batch has one shape, and code for one shape is the faster one.
        compiled = variant.mode == "compiled"
        self.call: Callable[..., Any] = torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self) -> Tensor:
        with self.variant.autocast(self.workload.device):
            return self.call(**self.batch).loss

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        with self.variant.kernels():  # the sampler mixes in it
            self.optimizer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def backward(self) -> None:
        with self.variant.kernels(), self.variant.matmul_precision():
            self.loss().backward()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of every parameter that has one, by name; the parameters let go of them."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    def fresh_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of one forward. Layers without a sampler draw their seeds from the default generator."""
        torch.manual_seed(0)
        self.optimizer.zero_grad()
        self.backward()
        return self.gradients()

    @property
    def targets(self) -> list[Tensor]:
        """The frozen targets of mixed layers, each once."""
        found = (getattr(module, "target", None) for module in self.model.modules())
        return list({target.data_ptr(): target for target in found if target is not None}.values())

    @property
    def target_bytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    @property
    def mixed_bytes(self) -> int:
        """The bytes of Phi, where it is kept between steps."""
        return 0 if self.sampler is None else self.sampler.extra_bytes

    def saved_bytes(self) -> int:
        """Count what one forward keeps for backward; weights, targets and Phi aside."""
        mixed = [layer.slot.mixed for layer in self.model.modules() if getattr(layer, "slot", None) is not None]
        known = [*self.model.parameters(), *self.model.buffers(), *self.targets, *(t for t in mixed if t is not None)]
        return memory.saved_bytes(self.loss, known)


def train_briefly(workload: str, variant: Variant) -> None:
    """Train until gradients and Adam's state exist from the start of a step: what peak memory is measured of."""
    Training(WORKLOADS[workload], variant).steps(WARMUP_STEPS)


class Captured:
    """The step of a training as one CUDA graph: each replay draws its masks, steps the optimizer and mixes anew.

    It trains the very weights of the eager steps, in turn with them, and needs no second copy of them.
    """

    def __init__(self, training: Training, pool: Any) -> None:
        self.training = training
        clocks.warm_up(training.step)
        training.optimizer.zero_grad()
        self.step = clocks.captured(training.step, pool)
        # In the graph's own memory, where each replay leaves them; an eager step makes its own.
        self._gradients = training.gradients()

    def fresh_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of a step that is taken for them."""
        self.step()
        return self._gradients

    def release(self) -> None:
        """Let other graphs of the pool use the gradients' memory, after the last call of ``fresh_gradients``."""
        self._gradients = {}
