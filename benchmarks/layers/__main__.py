"""Measures the layers on this machine: ``python -m benchmarks.layers``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import cpuinfo  # type: ignore[import-untyped]
import pytest
import torch

from .report import write

_HERE = Path(__file__).parent


def device_slug(device: str) -> str:
    """The name of the result files: nvidia-h200, amd-epyc-2-threads."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpuinfo.get_cpu_info().get('brand_raw', 'cpu')} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", name).lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one shape and few rounds: a smoke test")
    parser.add_argument("--seconds", type=float, help="of interleaved rounds per shape (25 on a CPU, 4 on a GPU)")
    parser.add_argument("--launch", choices=("graph", "eager"), default="graph", help="on a GPU; default: %(default)s")
    parser.add_argument("--shapes", default="", metavar="REGEX", help="only these, such as 2048x768x768-fp32")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only these layers, and nn.Linear: 'mixout|dropout'"
    )
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    json_path = options.output / f"{device_slug(options.device)}.json"
    json_path.unlink(missing_ok=True)  # a run that ends early must not pass for the one before it
    arguments = ["-c", str(_HERE / "pytest.ini"), "--rootdir", str(_HERE.parents[1]), str(_HERE)]
    arguments += [f"--benchmark-json={json_path}", f"--layers-device={options.device}"]
    arguments += [f"--layers-launch={options.launch}"]
    arguments += [f"--layers-shapes={options.shapes}", f"--layers-only={options.only}"]
    arguments += ["--layers-quick"] if options.quick else []
    arguments += [f"--layers-seconds={options.seconds}"] if options.seconds else []
    status = pytest.main(arguments)
    if json_path.exists():
        print(json_path, *write(json_path, options.output), sep="\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
