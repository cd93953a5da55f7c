"""Everything that is measured about one case: all its layers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mixout_kernels.functional import Mask

from .agreement import SEED, Agreement, Verdict
from .cases import Case, Operands
from .interleave import Sample, Sampler, interleave_for
from .sampling import Phases, make_sampler, operand_sets, saved_bytes
from .variants import Target, Variant

FEWEST_ROUNDS, MOST_ROUNDS = 11, 101


@dataclass
class Measurement:
    case: Case
    calls_per_sample: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # variant: why it cannot be measured

    @contextmanager
    def attempt(self, variant: Variant) -> Iterator[None]:
        """Whatever a layer raises is that layer's result; the others are measured all the same."""
        try:
            yield
        except Exception as error:
            self.failures[variant.name] = f"{type(error).__name__}: {error}"


def measure(case: Case, variants: Sequence[Variant], device: torch.device, seconds: float, launch: str) -> Measurement:
    """Checks this package's variants against the reference, then samples all variants in turn for ``seconds``."""
    torch.compiler.reset()  # else torch.compile stops after the eighth shape of one function
    torch.manual_seed(SEED)
    generator = torch.Generator(device).manual_seed(SEED)
    operands = [Operands.random(case, device, generator)]
    measurement = Measurement(case, operand_sets(case, device))

    # What several variants are to compute is found once, and let go before the next: it is in float64.
    alike: dict[tuple[Mask, float, Target], list[Variant]] = {}
    for variant in variants:
        if variant.backend and variant.mask and variant.target:
            alike.setdefault((variant.mask, variant.p, variant.target), []).append(variant)
    for configuration, members in alike.items():
        agreement = Agreement(operands[0], *configuration)
        for variant in members:
            with measurement.attempt(variant):
                measurement.verdicts[variant.name] = agreement.check(variant)
        del agreement

    operands += [Operands.random(case, device, generator) for _ in range(measurement.calls_per_sample - 1)]
    samplers: dict[str, Sampler] = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for variant in variants:
        if variant.name in measurement.failures:
            continue
        with measurement.attempt(variant):
            layer = variant.make()
            if variant.has_backward:
                measurement.saved[variant.name] = saved_bytes(layer, operands[0])
            samplers[variant.name] = make_sampler(Phases(layer, operands, variant.has_backward), device, launch, pool)
    measurement.samples = interleave_for(samplers, seconds, FEWEST_ROUNDS, MOST_ROUNDS)
    return measurement
