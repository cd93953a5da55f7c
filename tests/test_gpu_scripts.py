"""The pieces of tools/gpu on a machine without a GPU: their programs are scripts that note what they are asked for."""

import os
import re
import shutil
import subprocess
import tarfile

import pytest

from .conftest import ROOT

PIECES = ("correctness", "step", "layers", "sanitizer", "rest")
# Fails, or hangs, where its arguments contain what these variables say.
PYTHON = """#!/bin/sh
echo "$0 $*" >> "$NOTES"
case "$*" in *"$FAILS"*) echo "this one fails"; exit 3 ;; esac
case "$*" in *"$HANGS"*) sleep 60 ;; esac
"""
NEVER = "what no argument contains"

pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout command: the pieces are for Linux")


@pytest.fixture
def tree(tmp_path):
    """The scripts in a folder of their own, and the programs that they start."""
    shutil.copytree(ROOT / "tools" / "gpu", tmp_path / "tools" / "gpu")
    (tmp_path / "tests" / "cuda").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "cuda" / "sanitize.sh", tmp_path / "tests" / "cuda")
    (tmp_path / "bin").mkdir()
    for name in ("python3", "nvidia-smi", "compute-sanitizer", "ncu"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(tree, piece, fails=NEVER, hangs=NEVER):
    """Run a piece; the result with the lines of summary.txt and the files of its archive."""
    variables = {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}", "NOTES": str(tree / "notes"), "OUT": str(tree / "out")}
    done = subprocess.run(
        ["sh", str(tree / "tools" / "gpu" / f"{piece}.sh")],
        env={**variables, "FAILS": fails, "HANGS": hangs},
        cwd=tree / "bin",  # wherever one stands
        capture_output=True,
        text=True,
    )
    summary = (tree / "out" / "summary.txt").read_text().splitlines()
    with tarfile.open(tree / "out" / f"{piece}.tar.gz") as archive:
        files = {name for name in archive.getnames() if name.endswith(".log")}
    return done, summary, files


def parts(piece):
    script = (ROOT / "tools" / "gpu" / f"{piece}.sh").read_text()
    return ["machine", "build", *re.findall(r"^(?:part|step|layers) ([\w.-]+) ", script, re.MULTILINE)]


def test_all_pieces_leave_a_few_files(tree):
    for piece in PIECES:
        done, summary, files = run(tree, piece)
        assert done.returncode == 0, done.stdout
        assert files == {f"{piece}/{part}.log" for part in parts(piece)}
        own = [line.removeprefix(f"{piece}: ") for line in summary if line.startswith(piece)]
        assert [re.sub(r" passed, \d+ of \d+ s", "", line) for line in own[:-1]] == [
            f"{part}:" for part in parts(piece)
        ]
        assert own[-1].startswith("GREEN")
    assert len(list((tree / "out").iterdir())) == 1 + len(PIECES) <= 8


def test_a_part_that_fails_loses_nothing_else(tree):
    done, summary, files = run(tree, "correctness", fails="benchmarks.layers")
    assert done.returncode == 1
    assert files == {f"correctness/{part}.log" for part in parts("correctness")}
    verdicts = {line.split(": ")[1]: line.split(": ")[2] for line in summary[:-1]}
    assert verdicts.pop("quick-layer").startswith("failed with status 3")
    assert verdicts.keys() == {*parts("correctness")} - {"quick-layer"}
    assert all(verdict.startswith("passed") for verdict in verdicts.values())
    assert re.match(r"correctness: RED: quick-layer; \d+ s", summary[-1])
    assert "this one fails" in done.stdout  # the end of its log


def test_a_machine_without_anything_gets_to_the_end(tree):
    """No python that works, no nvidia-smi that does: every part is red, and there is a result to look at."""
    done, summary, files = run(tree, "sanitizer", fails="")
    assert done.returncode == 1
    assert files == {f"sanitizer/{part}.log" for part in parts("sanitizer")}
    assert summary[-1].startswith("sanitizer: RED: machine build memcheck racecheck synccheck initcheck;")


@pytest.mark.parametrize("module", ["xdist", "pytest_timeout"])
def test_a_package_that_is_missing_is_one_sentence(tree, module):
    done, summary, _ = run(tree, "correctness", fails=f"find_spec('{module}')")
    assert done.returncode == 0
    said = [line for line in summary if f"python has no {module}: " in line]
    assert len(said) == 2  # for each of the two parts that are tests
    tests = [line for line in (tree / "notes").read_text().splitlines() if "-m pytest" in line]
    assert len(tests) == 2
    assert all((" -n " in line) == (module != "xdist") for line in tests)
    assert all((" --timeout 60" in line) == (module != "pytest_timeout") for line in tests)


def piece_of_its_own(tree, seconds, *lines):
    script = ["#!/bin/sh", f"piece_seconds={seconds}", '. "$(dirname "$0")/common.sh"', *lines, "finish"]
    (tree / "tools" / "gpu" / "mine.sh").write_text("\n".join([*script, ""]))


def test_a_part_that_hangs_is_stopped_and_the_next_one_runs(tree):
    piece_of_its_own(tree, 60, 'part first 1 "$PY" hang', "part second 10 echo done")
    done, summary, files = run(tree, "mine", hangs="hang")
    assert done.returncode == 1
    assert files == {"mine/first.log", "mine/second.log"}
    assert re.fullmatch(r"mine: first: stopped at its limit, [1-9] of 1 s", summary[0])
    assert summary[1].startswith("mine: second: passed")


def test_no_part_outlives_its_piece(tree):
    piece_of_its_own(tree, 6, "part first 100 sleep 50", "part second 100 echo done")
    _, summary, files = run(tree, "mine")
    assert re.match(r"mine: first: stopped at its limit, [5-8] of [56] s", summary[0])
    assert summary[1] == "mine: second: left out, no time is left"
    assert files == {"mine/first.log"}


def test_every_piece_ends_within_ten_minutes_and_is_in_the_readme():
    readme = (ROOT / "tools" / "gpu" / "README.md").read_text()
    for piece in PIECES:
        script = (ROOT / "tools" / "gpu" / f"{piece}.sh").read_text()
        seconds = int(re.search(r"^piece_seconds=(\d+)$", script, re.MULTILINE)[1])
        assert seconds + 10 < 600  # the last part has ten more between the two signals
        assert f"sh tools/gpu/{piece}.sh" in readme
    assert re.findall(r"^sh tools/gpu/(\w+)\.sh", readme, re.MULTILINE) == [*PIECES]
