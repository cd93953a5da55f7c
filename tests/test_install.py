"""setup.py on machines that miss something, and what it distributes.

Nothing is compiled here: ``make test`` itself builds the extension, ``make dist`` what is released.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mixout_kernels
from tools import check_dist

from .conftest import ROOT, make_targets

BLOCK_TORCH = (
    "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', *sys.argv[1:]]; "
    "runpy.run_path('setup.py', run_name='__main__')"
)

if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree: setuptools writes beside setup.py."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("mixout_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def setup(source, *arguments, path="", run=("setup.py",), **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC") and not k.startswith("MIXOUT_KERNELS_")}
    # Beside a CUDA build of torch there would be a second notice. tests/cuda/test_setup.py is about it.
    inherited["MIXOUT_KERNELS_CUDA"] = "0"
    return subprocess.run(
        [sys.executable, *run, *(arguments or ("--name",))],
        capture_output=True,
        text=True,
        cwd=source,
        env={**inherited, "PATH": path, **environment},
    )


def folder_with(tmp_path, *programs):
    """A PATH on which nothing but these is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in programs:
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_no_compiler_and_nothing_asked_for_is_a_notice(source, tmp_path):
    done = setup(source, path=folder_with(tmp_path, "ninja"))
    assert done.returncode == 0
    assert done.stdout.split() == ["mixout_kernels"]
    assert done.stderr.strip() == (
        "mixout_kernels: installing without the CPU kernels (no C++ compiler: c++ is not on PATH)"
    )


def test_no_compiler_and_kernels_asked_for_is_one_clear_error(source, tmp_path):
    done = setup(source, path=folder_with(tmp_path, "ninja"), MIXOUT_KERNELS_CPU="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == (
        "MIXOUT_KERNELS_CPU=1, but the CPU kernels cannot be built: no C++ compiler: c++ is not on PATH"
    )


def test_the_compiler_that_cxx_names_is_the_one_that_is_missed(source, tmp_path):
    done = setup(source, path=folder_with(tmp_path, "ninja"), MIXOUT_KERNELS_CPU="1", CXX="no-such-compiler -O2")
    assert done.stderr.strip().endswith("no C++ compiler: no-such-compiler is not on PATH")


def test_no_ninja(source, tmp_path):
    done = setup(source, path=folder_with(tmp_path, "c++", "g++"), MIXOUT_KERNELS_CPU="1")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("cannot be built: ninja is not on PATH; pip install ninja")


def test_kernels_left_out_on_purpose_is_silent(source, tmp_path):
    done = setup(source, path=folder_with(tmp_path), MIXOUT_KERNELS_CPU="0")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["mixout_kernels"], "")


def test_a_setting_that_does_not_exist(source):
    done = setup(source, MIXOUT_KERNELS_CPU="yes")
    assert done.returncode == 1
    assert done.stderr.strip() == "MIXOUT_KERNELS_CPU: expected auto, 0 or 1, got 'yes'"


@pytest.mark.parametrize(("wanted", "code"), [("auto", 0), ("1", 1)])
def test_no_torch_in_the_build_environment(source, wanted, code):
    """As under pip's build isolation: a plain install must work."""
    done = setup(source, "--name", path=os.environ["PATH"], run=("-c", BLOCK_TORCH), MIXOUT_KERNELS_CPU=wanted)
    assert done.returncode == code, done.stderr
    assert "torch is not importable in the build environment; pip install torch, then use --no-build-isolation" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_pure_python_package_is_whole(source, tmp_path):
    done = setup(source, "--quiet", "build", "--build-lib", str(tmp_path / "built"), path="", MIXOUT_KERNELS_CPU="0")
    assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path / "built")) for path in (tmp_path / "built").rglob("*") if path.is_file()}
    present = {
        str(path.relative_to(source))
        for path in (source / "mixout_kernels").rglob("*")
        if path.is_file() and path.suffix in (".py", ".typed", ".json")
    }
    assert present - built == set(), "left out"
    assert built - present == set()
    assert str(Path("mixout_kernels") / "py.typed") in built


def test_the_version_is_written_once(source):
    """In the package, from where setup.py reads it without torch. What cannot read it is held to it here."""
    done = setup(source, "--version", run=("-c", BLOCK_TORCH), MIXOUT_KERNELS_CPU="0")
    assert (done.returncode, done.stdout.strip()) == (0, mixout_kernels.__version__), done.stderr
    assert f"\nversion: {mixout_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{mixout_kernels.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone: what belongs to it is not known")
@pytest.mark.parametrize("run", [("setup.py",), ("-c", BLOCK_TORCH)], ids=["torch", "no torch"])
def test_the_source_distribution_is_whole(tmp_path, run):
    """With torch or without it in the build environment, with the tests, and with every header of the kernels."""
    source = tmp_path / "clone"
    for name in check_dist.tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    done = setup(source, "--quiet", "sdist", "--dist-dir", str(tmp_path), path=os.environ["PATH"], run=run)
    assert done.returncode == 0, done.stderr
    [sdist] = tmp_path.glob("*.tar.gz")
    assert check_dist.problems_of_sdist(check_dist.files_of_sdist(sdist)) == []


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not a clone")
def test_workflows_run_what_is_there():
    """They are YAML, and what a step runs of this repository exists; nothing here can run them."""
    yaml = pytest.importorskip("yaml")
    targets = make_targets()
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["checks", "docs", "release", "torch"]
    for path in workflows:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            assert "runs-on" in job, f"{path.name}: {name}"
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), f"{path.name}: {name}: {step}"
                assert set(re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.MULTILINE)) <= targets


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
@pytest.mark.parametrize("folder", ["inside", "outside"])
def test_a_clone_installed_as_editable_has_its_kernels_everywhere(tmp_path, folder):
    """`make` installs it so, and the README says so: the kernels lie beside the sources, wherever python is started."""
    code = "from mixout_kernels import _extension; module, reason = _extension.load(); print(module.__file__, reason)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT if folder == "inside" else tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "mixout_kernels"
