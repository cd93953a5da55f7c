"""What the suite is on a machine with a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from .conftest import ROOT


def collected(*arguments: str) -> list[str]:
    """The test ids of a fresh process, which decides for itself what there is to test."""
    environment = {name: value for name, value in os.environ.items() if name != "MIXOUT_KERNELS_CUDA_EMULATION"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if "::" in line]


def test_a_gpu_multiplies_no_test_of_the_cuda_kernels():
    """They run on the GPU in place of the emulation, each of them once."""
    there, here = collected("-p", "tests.pretend_gpu", "tests/cuda"), collected("tests/cuda")
    assert len(here) > 1000
    assert sorted(there) == sorted(here)


def test_tests_of_the_package_run_on_every_device():
    ids = collected("-p", "tests.pretend_gpu", "tests/whole_model/test_masks.py::test_device")
    assert [re.search(r"\[(\w+)\]", name)[1] for name in ids] == ["cpu", "cuda"]


@pytest.mark.parametrize("broken", [[], ["memcheck"], ["racecheck", "initcheck"]], ids=str)
def test_sanitize_runs_every_tool(tmp_path, broken):
    """Whatever the others found; a stand-in plays compute-sanitizer."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(f'#!/bin/sh\ncase " {" ".join(broken)} " in *" $2 "*) exit 1;; esac\n')
    sanitizer.chmod(0o755)
    run = subprocess.run(
        ["sh", "tests/cuda/sanitize.sh", "no-python"],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    *tools, verdict = run.stdout.splitlines()
    assert tools == ["== memcheck", "== racecheck", "== synccheck", "== initcheck"]
    assert verdict == (f"sanitize: failed: {' '.join(broken)}" if broken else "sanitize: every tool passed")
    assert run.returncode == bool(broken)
