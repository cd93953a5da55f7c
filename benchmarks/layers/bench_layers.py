"""One pytest-benchmark entry per shape, layer and direction; the samples come from one interleaved run per shape."""

from __future__ import annotations

import time
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import Settings
from .interleave import ReplayClock
from .measurement import Measurement, measure
from .results import LINEAR
from .roofline import Ceilings, measure_ceilings, work

MODES = ("forward", "backward", "both")
CLOCK = ReplayClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    entries = [
        pytest.param(case, variant.name, mode, id=f"{case}-{variant.name}-{mode}")
        for case, variants in metafunc.config.stash[Settings.key].variants.items()
        for variant in variants.values()
        for mode in (MODES if variant.has_backward else MODES[:1])
    ]
    metafunc.parametrize(("case", "variant", "mode"), entries)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    return pytestconfig.stash[Settings.key]


@pytest.fixture(scope="session")
def ceilings(settings: Settings) -> Ceilings:
    settings.ceilings = measure_ceilings(settings.device, {case.dtype_name for case in settings.cases.values()})
    return settings.ceilings


@pytest.fixture
def measurement(settings: Settings, ceilings: Ceilings, case: str) -> Measurement:
    """Of this case, taken when its first entry comes."""
    if settings.latest is None or settings.latest.case.name != case:
        variants = list(settings.variants[case].values())
        started = time.perf_counter()
        settings.latest = measure(settings.cases[case], variants, settings.device, settings.seconds, settings.launch)
        rounds = len(settings.latest.samples[LINEAR])
        settings.say(f"{case}: {len(variants)} layers, {rounds} rounds, {time.perf_counter() - started:.0f} s")
    return settings.latest


@pytest.mark.benchmark(timer=CLOCK)
def test_layer(
    benchmark: BenchmarkFixture,
    settings: Settings,
    ceilings: Ceilings,
    measurement: Measurement,
    case: str,
    variant: str,
    mode: str,
) -> None:
    shape, layer = settings.cases[case], settings.variants[case][variant]
    if failure := measurement.failures.get(variant):
        if not layer.ours:
            pytest.skip(f"{layer.provider} cannot run here: {failure}")
        pytest.fail(f"{variant} cannot run: {failure}", pytrace=False)

    benchmark.group = f"{case} {mode}"
    samples = [getattr(sample, mode) for sample in measurement.samples[variant]]
    CLOCK.play(benchmark, samples)
    seconds = median(samples)
    need = work(shape, layer, mode)
    verdict = measurement.verdicts.get(variant)
    benchmark.extra_info.update(
        rows=shape.rows,
        in_features=shape.in_features,
        out_features=shape.out_features,
        dtype=shape.dtype_name,
        provider=layer.provider,
        backend=layer.backend,
        schedule=layer.schedule,
        mask=layer.mask,
        p=layer.p,
        target=layer.target,
        calls_per_sample=measurement.calls_per_sample,
        gflop_per_second=need.flops / seconds / 1e9,
        gbyte_per_second=need.bytes / seconds / 1e9,
        roofline_share=ceilings.seconds(need, shape.dtype_name) / seconds,
        saved_bytes=measurement.saved.get(variant),
        matches_reference=None if verdict is None else verdict.matches,
        error_over_budget=None if verdict is None else verdict.worst,
    )
    if settings.device.type == "cuda":
        benchmark.extra_info["event_ms"] = seconds * 1e3
    if verdict is not None and not verdict.matches:
        pytest.fail(
            f"{variant} does not match the reference: the error of {verdict.where} is {verdict.worst:.3g} x its budget",
            pytrace=False,
        )
