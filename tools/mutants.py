"""Whether the emulation notices a missing barrier, wait or fence: each one of csrc/cuda is taken out in turn.

    python -m tools.mutants                  all of them, some minutes
    python -m tools.mutants columns          those of the files whose names have "columns" in them

In a copy of the repository, one call at a time is removed from the kernels, the emulation is built anew and the tests
of that file run until one fails. A call whose absence no test notices is either not needed or not tested: it is
reported, and the exit status is 1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
KERNELS = Path("csrc", "cuda")
# What the emulation builds upon is not what it tests.
INTRINSICS = ("intrinsics.h", "host_emulation.h", "host_machine.h")
# Arguments of pytest: of the tests of the products those whose blocks share a contraction.
TESTS = {
    "columns.cu": ["tests/cuda/test_columns.py"],
    "product.cuh": ["tests/cuda/test_products.py", "-k", "test_splits"],
}
CALL = re.compile(r"\b(?:synchronize_block|copy_async_wait|copy_async_commit|device_fence)\([^;()]*\);")
TIME_LIMIT = 900  # seconds of the build and the tests of one mutant; a missing barrier may also make them endless


@dataclass(frozen=True)
class Mutant:
    source: Path  # in the repository
    start: int
    call: str

    def line(self, text: str) -> int:
        return text.count("\n", 0, self.start) + 1

    def applied_to(self, text: str) -> str:
        """The source without the call; an empty statement takes its place."""
        return text[: self.start] + ";" + text[self.start + len(self.call) :]


def mutants(folder: Path) -> list[Mutant]:
    """All of them, in the order of the files."""
    found = []
    for path in sorted((folder / KERNELS).iterdir()):
        if path.name not in INTRINSICS:
            source = path.relative_to(folder)
            found += [Mutant(source, match.start(), match[0]) for match in CALL.finditer(path.read_text())]
    return found


def is_noticed(copy: Path, tests: list[str]) -> bool:
    """Whether a test of the copy fails. The tests may also abort, or never end: the emulation sees to the first."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return True
    if run.returncode not in (0, 1, -6):
        raise RuntimeError(f"pytest {' '.join(tests)} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.returncode != 0


def copy_repository(to: Path) -> None:
    for name in ("csrc", "mixout_kernels", "tests"):
        shutil.copytree(REPOSITORY / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", to)


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    found = [mutant for mutant in mutants(REPOSITORY) if wanted in mutant.source.name]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_repository(copy)
        for name in sorted({mutant.source.name for mutant in found}):
            if is_noticed(copy, TESTS[name]):
                sys.exit(f"tools.mutants: the tests of {name} fail with the kernels as they are; nothing was shown")
        for mutant in found:
            source = copy / mutant.source
            original = source.read_text()
            source.write_text(mutant.applied_to(original))
            noticed = is_noticed(copy, TESTS[mutant.source.name])
            source.write_text(original)
            missed += not noticed
            verdict = "noticed" if noticed else "MISSED"
            print(f"{verdict:8} {mutant.source}:{mutant.line(original)} without {mutant.call}", flush=True)
    print(f"{len(found) - missed} of {len(found)} were noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
