"""What the suite runs on. A *case* is a backend on a device; most tests are written once and run for every case.

    cpu        where the C++ extension is built
    triton     on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors
    cuda       on a GPU, or in its emulation (MIXOUT_KERNELS_CUDA_EMULATION=1) on CPU tensors
    reference  everywhere, in the tests that have another oracle than the reference itself

``pytest --backend NAME`` (repeatable) keeps the tests that run for the named ones alone. Of each test an emulated
backend takes a few parametrisations, drawn once and for all by the test's name; ``--exhaustive`` takes all.
"""

from __future__ import annotations

import os

# Read when torch is loaded. OpenMP threads that spin at every barrier made the suite eight times slower (3 s to 30 s
# for test_mix.py) on two cores that something else was using too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

from mixout_kernels import _extension, backends, functional

from .memory import guarded_memory, poisoned_memory  # noqa: F401  fixtures of the whole suite

ROOT = Path(__file__).resolve().parents[1]
# Of each test, unless --exhaustive asks for all. An interpreted kernel takes seconds.
PARAMETRISATIONS_EMULATED = {"triton": 1, "cuda": 2}

# derandomize: a run is repeatable, on every machine. Few examples: each is a whole forward and backward.
hypothesis.settings.register_profile(
    "suite",
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _plans_of_its_own():
    """A test that changes what a backend is or chooses must neither find plans of before nor leave its own."""
    functional._plan.cache_clear()
    yield
    functional._plan.cache_clear()


@dataclass(frozen=True)
class Case:
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def emulated(self) -> bool:
        """A GPU kernel that an interpreter or an emulation runs on CPU tensors: thousands of times slower."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"

    def schedules(self, compute: torch.dtype = torch.float32) -> tuple[str | None, ...]:
        """None, which lets the backend choose, and what it can be asked for."""
        return (None,) if self.backend == "reference" else (None, *backends.load(self.backend).schedules(compute))

    def require(
        self, weight: torch.dtype, target: torch.dtype | None = None, compute: torch.dtype | None = None
    ) -> None:
        """Skips where a GPU backend says that it cannot do these dtypes. The CPU backend and the reference must."""
        if self.backend in ("cpu", "reference"):
            return
        reason = backends.load(self.backend).unsupported_reason(
            self.device, weight, target or weight, compute or weight
        )
        if reason:
            pytest.skip(reason)

    def skip_if_emulated(self, why: str) -> None:
        if self.emulated:
            pytest.skip(f"{self}: {why}")


def _available_cases() -> list[Case]:
    found = [Case("reference", "cpu")]
    if _extension.load()[0] is not None:
        found.append(Case("cpu", "cpu"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from .triton import interpreter

        interpreter.mend()
        found.append(Case("triton", "cpu"))
    if os.environ.get("MIXOUT_KERNELS_CUDA_EMULATION") == "1":
        from .cuda import emulation

        emulation.register()
        found.append(Case("cuda", "cpu"))
    if torch.cuda.is_available():
        found += [Case("reference", "cuda"), Case("triton", "cuda"), Case("cuda", "cuda")]
    return found


_CASES = pytest.StashKey[list[Case]]()


def pytest_configure(config: pytest.Config) -> None:
    # Once, and before collection: tests/cuda/conftest.py sets the environment variable of the emulation for itself.
    wanted = config.getoption("--backend")
    config.stash[_CASES] = [case for case in _available_cases() if not wanted or case.backend in wanted]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=["reference", *backends.KERNELS],
        help="only the tests that run for this backend (repeatable; default: every one that is available here)",
    )
    parser.addoption(
        "--exhaustive", action="store_true", help="every parametrisation for emulated backends too, which takes hours"
    )


def pytest_report_header(config: pytest.Config) -> str:
    reason = _extension.load()[1]
    return f"mixout_kernels: {', '.join(map(str, config.stash[_CASES])) or 'no backend'}" + (reason and f" ({reason})")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = metafunc.config.stash[_CASES]
    if "any_case" in metafunc.fixturenames:
        metafunc.parametrize("any_case", cases, ids=str)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [case for case in cases if case.backend != "reference"], ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests: dict[tuple[str, Case | None], list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        case = parameters.get("case", parameters.get("any_case"))
        tests.setdefault((item.nodeid.partition("[")[0], case), []).append(item)
    left_out = set()
    for (name, case), members in tests.items():
        if case is None:
            left_out |= set(members) if config.getoption("--backend") else set()
        elif case.emulated and not config.getoption("--exhaustive"):
            count = min(len(members), PARAMETRISATIONS_EMULATED[case.backend])
            left_out |= {*members} - {*random.Random(name).sample(members, count)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


# A fixture with parameters and no metafunc.parametrize: that one would also multiply the tests of a folder that has a
# `device` of its own, as tests/cuda has.
@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> str:
    """Where the backends that are tested run."""
    if not any(case.device == request.param and not case.emulated for case in pytestconfig.stash[_CASES]):
        pytest.skip(f"none of the backends asked for runs on {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def compile_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[[str], str]]:
    """Compiles C++ for the host; the result is called with the program's input and returns its output."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("NO C++ COMPILER: csrc is not tested against the reference here")

    def build(name: str, source: str, *arguments: str) -> Callable[[str], str]:
        folder = tmp_path_factory.mktemp(name)
        (folder / "main.cpp").write_text(source)
        program = folder / "program"
        command = [
            *compiler.split(),
            "-O2",
            f"-I{ROOT / 'csrc'}",
            str(folder / "main.cpp"),
            *arguments,
            "-o",
            str(program),
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return lambda text: (
            subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True).stdout
        )

    return build


def make_targets() -> set[str]:
    """Of the Makefile, as make itself has read it."""
    database = subprocess.run(
        ["make", "--question", "--print-data-base", "--no-builtin-rules"], cwd=ROOT, capture_output=True, text=True
    )
    return set(re.findall(r"^([a-z-]+):(?!=)", database.stdout, re.MULTILINE))
