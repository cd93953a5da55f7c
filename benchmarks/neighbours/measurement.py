"""Times and saved memory of every variant, side by side."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import mixout_kernels as mk
from benchmarks.common import clocks
from benchmarks.common.agreement import Verdict, compare_model
from benchmarks.common.interleave import interleave
from benchmarks.common.memory import saved_bytes
from benchmarks.common.rows import Row, attempt, guarded
from benchmarks.step.workload import Workload

from .published import fisher_by_loop
from .variants import FisherPass, Step

WARMUP_STEPS = 3


class Training:
    def __init__(self, workload: Workload, variant: Step) -> None:
        self.variant, self.batch = variant, workload.batch()
        self.model = workload.model()
        prepared = variant.prepare(self.model)
        self.sampler = prepared if isinstance(prepared, mk.MixSampler) else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.variant.loss(self.model, self.batch).backward()
        if self.variant.before_step is not None:
            self.variant.before_step(self.model)
        self.optimizer.step()

    def saved_bytes(self) -> int:
        targets = [
            module.target for module in self.model.modules() if isinstance(getattr(module, "target", None), Tensor)
        ]
        known = [*self.model.parameters(), *self.model.buffers(), *targets]
        return saved_bytes(lambda: self.variant.loss(self.model, self.batch), known)

    def check(self) -> Verdict:
        """Compare the gradients with those of the reference under the same masks."""
        self.optimizer.zero_grad()
        self.variant.loss(self.model, self.batch).backward()
        ours = _gradients(self.model)
        self.optimizer.zero_grad()
        return compare_model(ours, self._reference(exact=False), self._reference(exact=True))

    def _reference(self, exact: bool) -> dict[str, Tensor]:
        assert self.sampler is not None
        model = copy.deepcopy(self.model)
        model = model.double() if exact else model
        sampler = mk.MixSampler(model)
        sampler.load_state_dict(self.sampler.state_dict())
        with mk.kernels(backend="reference"):
            self.variant.loss(model, self.batch).backward()
        sampler.remove()
        return _gradients(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measure(
    workload: Workload, steps: Sequence[Step], passes: Sequence[FisherPass], rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """Take the steps of all variants in turn, and then the passes: every round one sample of each."""
    rows = {variant.name: Row(workload.name, variant.name, "step") for variant in steps}
    samplers: dict[str, Callable[[], float | None]] = {}
    for variant in steps:
        say(f"{variant.name}: warm-up")
        row = rows[variant.name]
        with attempt([row]):
            training = Training(workload, variant)
            for _ in range(WARMUP_STEPS):
                training.step()
            row.facts["saved_bytes"] = training.saved_bytes()
            if variant.ours:
                row.judge(training.check())
            samplers[variant.name] = guarded([row], _sampler(training.step))
        gc.collect()
    _sample(rows, samplers, rounds, say)
    samplers.clear()
    gc.collect()
    return [*rows.values(), *_measure_passes(workload, passes, rounds, say)]


def _measure_passes(
    workload: Workload, passes: Sequence[FisherPass], rounds: int, say: Callable[[str], None]
) -> list[Row]:
    rows = {one.name: Row(workload.name, one.name, "fisher") for one in passes}
    model, batch = workload.model(), workload.batch()
    exact = fisher_by_loop(copy.deepcopy(model).double(), batch)
    reference = fisher_by_loop(model, batch)
    samplers: dict[str, Callable[[], float | None]] = {}
    for one in passes:
        row = rows[one.name]
        with attempt([row]):
            found = one.compute(model, batch)
            if one.ours:
                assert isinstance(found, dict)
                pair = [{k: t.mean() if one.mean else t for k, t in tensors.items()} for tensors in (reference, exact)]
                row.judge(compare_model(found, *pair))
            samplers[one.name] = guarded([row], _sampler(lambda one=one: one.compute(model, batch)))  # type: ignore[misc]
    _sample(rows, samplers, rounds, say)
    return list(rows.values())


def _sample(
    rows: dict[str, Row], samplers: dict[str, Callable[[], float | None]], rounds: int, say: Callable[[str], None]
) -> None:
    say(f"{rounds} rounds of {len(samplers)} variants")
    samples = interleave(samplers, rounds)
    for name, row in rows.items():
        if row.failure is None:
            row.samples = [sample for sample in samples[name] if sample is not None]


def _sampler(phase: Callable[[], object]) -> Callable[[], float]:
    timed = clocks.sampler([phase], torch.device("cpu"))

    def sample() -> float:
        (seconds,) = timed()
        return seconds

    return sample
