"""Options of the layer benchmark, and what its JSON says about the machine."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mixout_kernels as mk

from .cases import Case, cases_for
from .measurement import Measurement
from .results import LINEAR
from .roofline import Ceilings
from .variants import Variant, variants_for


@dataclass
class Settings:
    """Of one run, and what it knows so far."""

    key = pytest.StashKey["Settings"]()

    config: pytest.Config
    device: torch.device
    cases: dict[str, Case]
    variants: dict[str, dict[str, Variant]]  # by case, by name
    seconds: float
    launch: str
    ceilings: Ceilings | None = None
    latest: Measurement | None = None

    def say(self, line: str) -> None:
        if reporter := self.config.pluginmanager.get_plugin("terminalreporter"):
            reporter.ensure_newline()
            reporter.write_line(line)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error
    return text


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layers", "the layer benchmark")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--layers-device", choices=("cpu", "cuda"), default=default)
    group.addoption("--layers-quick", action="store_true", help="one shape and few rounds: a smoke test")
    group.addoption("--layers-seconds", type=float, default=None, help="of interleaved rounds per shape")
    group.addoption("--layers-shapes", type=_pattern, default="", help="regular expression: only these shapes")
    group.addoption("--layers-only", type=_pattern, default="", help="regular expression: only these and nn.Linear")
    group.addoption("--layers-launch", choices=("graph", "eager"), default="graph", help="on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("layers_device"))
    quick = config.getoption("layers_quick")
    seconds = config.getoption("layers_seconds") or (2.0 if quick else 25.0 if device.type == "cpu" else 4.0)
    shapes, only = (re.compile(config.getoption(name)) for name in ("layers_shapes", "layers_only"))
    cases = [case for case in cases_for(device.type, quick) if shapes.search(case.name)]
    variants = {
        case.name: {v.name: v for v in variants_for(case, device.type) if v.name == LINEAR or only.search(v.name)}
        for case in cases
    }
    config.stash[Settings.key] = Settings(
        config=config,
        device=device,
        cases={case.name: case for case in cases},
        variants=variants,
        seconds=seconds,
        launch=config.getoption("layers_launch") if device.type == "cuda" else "eager",
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    settings = config.stash[Settings.key]
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {name: cpu.get(name) for name in ("brand_raw", "arch", "count", "hz_advertised_friendly")}
    del machine_info["node"]  # a host's name says nothing about its speed
    on_gpu = settings.device.type == "cuda"
    machine_info["layers"] = {
        "device": torch.cuda.get_device_name() if on_gpu else cpu.get("brand_raw", machine_info["machine"]),
        "device_type": settings.device.type,
        "launch": settings.launch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mixout_kernels": mk.__version__,
        "bytes_per_second": settings.ceilings.bytes_per_second if settings.ceilings else None,
        "flops_per_second": settings.ceilings.flops_per_second if settings.ceilings else None,
    }


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch"):
        commit_info.pop(name, None)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # The quartiles stay. With every sample a GPU's thousands of entries would make a file too large to keep.
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
