"""Builds the wheel out of the source distribution, as `pip install` does, and checks both: `make dist` runs it.

    python tools/check_dist.py dist

Nothing may be missing in either. The wheel is built, with the C++ kernels, in an environment that has never seen this
repository, and installed there; a test of the kernels, from the source distribution, then runs outside the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Of the files under version control these stay behind: they are for the repository, not for what is built from it.
NOT_DISTRIBUTED = (".ci/", ".github/", ".gitignore")

# Run in the fresh environment.
IS_INSTALLED = """
import sys
from pathlib import Path
import mixout_kernels
from mixout_kernels import _extension

folder = Path(mixout_kernels.__file__).parent
extension, reason = _extension.load()
assert folder.is_relative_to(sys.prefix), f"imported from {folder}, which is not in {sys.prefix}"
assert extension is not None, reason
assert Path(extension.__file__).parent == folder, extension.__file__
print("mixout_kernels", mixout_kernels.__version__, "with its C++ kernels")
"""


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and not name.startswith(NOT_DISTRIBUTED)}


def files_of_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def files_of_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def problems_of_sdist(files: set[str]) -> list[str]:
    """What is missing beside the files under version control, and what was built and does not belong there."""
    missing = [f"the sdist lacks {name}" for name in sorted(tracked_files() - files)]
    return missing + [f"the sdist holds {name}" for name in sorted(files) if name.endswith((".so", ".pyc"))]


def problems_of_wheel(files: set[str]) -> list[str]:
    """A wheel holds the package, its one extension and nothing else."""
    extension = "mixout_kernels/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    expected = {name for name in tracked_files() if name.startswith("mixout_kernels/")} | {extension}
    missing = [f"the wheel lacks {name}" for name in sorted(expected - files)]
    return missing + [f"the wheel holds {name}" for name in sorted(files - expected)]


def new_environment(folder: Path) -> Path:
    """The python of a new virtual environment, in which torch and the other packages of this one can be imported.

    A line of a .pth file adds their folder behind the new environment's own, and the .pth files in that are not
    followed: an editable installation of this repository stays unknown.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(purelib) / "packages_of_the_build.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


class FreshEnvironment:
    """Runs python in a new environment, from a folder that holds the tests and not the package's source."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.python = new_environment(environment)
        self.folder = folder
        # This environment's bin holds ninja.
        path = os.pathsep.join([str(self.python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables = {**os.environ, "PATH": path, "MIXOUT_KERNELS_CPU": "1", "MIXOUT_KERNELS_CUDA": "0"}
        self.variables.pop("PYTHONPATH", None)

    def run(self, *arguments: str | Path) -> None:
        print("+ python", *arguments, flush=True)
        subprocess.run([self.python, *arguments], cwd=self.folder, env=self.variables, check=True)

    def pip(self, command: str, *arguments: str | Path) -> None:
        self.run("-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps", *arguments)


def main(dist: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    exit_with(problems_of_sdist(files_of_sdist(sdist)))

    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(temporary / "unpacked", filter="data")
        [unpacked] = (temporary / "unpacked").iterdir()
        outside = temporary / "outside"
        outside.mkdir()
        (unpacked / "tests").rename(outside / "tests")

        fresh = FreshEnvironment(temporary / "environment", outside)
        fresh.pip("wheel", "--no-build-isolation", "--wheel-dir", dist, sdist)
        [wheel] = dist.glob("*.whl")
        exit_with(problems_of_wheel(files_of_wheel(wheel)))

        # --ignore-installed: pip sees the packages of the environment that this runs in, this one among them.
        fresh.pip("install", "--ignore-installed", wheel)
        (outside / "is_installed.py").write_text(IS_INSTALLED)
        fresh.run("is_installed.py")
        # Their oracle is the reference: every mask, dtype and shape, forward and backward, in the C++ kernels.
        fresh.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_mix_linear.py", "--backend", "cpu")


def exit_with(problems: list[str]) -> None:
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
