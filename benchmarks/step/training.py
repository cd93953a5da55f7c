"""A variant in training, one step at a time, and what a step keeps in memory; the step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .variants import Variant
from .workload import Workload

# The first step makes Adam's state and mixes layer by layer, the second runs in the memory that stays.
WARMUP_STEPS = 3


class Training:
    def __init__(self, workload: Workload, variant: Variant) -> None:
        self.workload, self.variant = workload, variant
        self.model = workload.model()
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
        with self.workload.autocast():
            return self.call(**self.batch).loss

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        with self.variant.kernels():  # the sampler mixes in it
            self.optimizer.step()

    def backward(self) -> None:
        with self.variant.kernels():
            self.loss().backward()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that has one, by name; the parameters let go of them."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    @property
    def target_bytes(self) -> int:
        """Of the frozen targets, each once."""
        targets = {t.data_ptr(): t.nbytes for name, t in self.model.named_buffers() if name.endswith(".target")}
        return sum(targets.values())

    @property
    def mixed_bytes(self) -> int:
        """Of Phi, where it is kept between steps."""
        return 0 if self.sampler is None else self.sampler.extra_bytes

    def saved_bytes(self) -> int:
        """What one forward keeps for backward, each storage once; weights, targets and Phi aside."""
        mixed = [layer.slot.mixed for layer in self.model.modules() if getattr(layer, "slot", None) is not None]
        known = [*self.model.parameters(), *self.model.buffers(), *(t for t in mixed if t is not None)]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
        saved: dict[int, Tensor] = {}  # the tensors themselves: a freed address would be used again

        def note(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in addresses:
                saved[address] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss()
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class Captured:
    """The step of a training as one CUDA graph: each replay draws its masks, steps the optimizer and mixes anew.

    It trains the very weights of the eager steps, in turn with them, and needs no second copy of them.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # on the stream of a capture nothing may be done for the first time
            for _ in range(WARMUP_STEPS):
                training.step()
        torch.cuda.current_stream().wait_stream(side)
        training.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            training.step()
        # In the graph's own memory, where each replay leaves them; an eager step makes its own.
        self._gradients = training.gradients()

    def step(self) -> None:
        self.graph.replay()

    def gradients(self) -> dict[str, Tensor]:
        """Of a step that is taken for them."""
        self.step()
        return self._gradients
