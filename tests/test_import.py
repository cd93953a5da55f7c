"""The package in a fresh process: without its extension, with one of another torch, without triton."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mixout_kernels
from mixout_kernels import _extension

PACKAGE = Path(mixout_kernels.__file__).parent

# One layer, all it computes compared with the reference, and every warning on the way. Small integers and p = 0.5:
# every sum is exact, so each backend must give the reference's bits, in whatever order it adds.
LAYER = """
import json, sys, warnings
# An editable install finds the extension in the source tree, whatever folder the package itself comes from.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch
import mixout_kernels as mk

torch.manual_seed(0)
x, w, u = (torch.randint(-9, 10, shape).float() for shape in ((5, 20), (7, 20), (7, 20)))
w.requires_grad_()
def gradients(backend):
    y = mk.mix_linear(x, w, u, p=0.5, seed=3, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.sum(), w), mk.mixout(w, u, p=0.5, seed=3, backend=backend).detach()]

def error(call):
    try:
        call()
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    first, second = gradients(None), gradients(None)
    mask = mk.keep_mask(3, p=0.5, shape=(7, 20))
    mk.MixLinear(20, 7, p=0.5)(x)
expected = gradients("reference")
print(json.dumps({
    "equal": all(map(torch.equal, first, expected)) and all(map(torch.equal, second, expected)),
    "mask": torch.equal(mask, mk.reference.keep_mask(3, p=0.5, shape=(7, 20))),
    "warnings": [str(warning.message) for warning in said if "mixout_kernels" in str(warning.message)],
    "file": mk.__file__,
    "cpu": error(lambda: gradients("cpu")),
    "triton": error(lambda: gradients("triton")),
    "cuda": error(lambda: gradients("cuda")),
    "modules": sorted(sys.modules),
}))
"""


def run(code, *, path, arguments=()):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    for name in ("TRITON_INTERPRET", "MIXOUT_KERNELS_CUDA_EMULATION"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    """The package's Python files alone, in a folder of their own."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


@pytest.fixture
def extension_file():
    extension = _extension.load()[0]
    if extension is None:
        pytest.skip("no compiled extension")
    return Path(extension.__file__)


def assert_runs_on_the_reference(report, folder, reason):
    """Right results, one warning in the whole process, and an error with the same reason for backend="cpu"."""
    assert Path(report["file"]).is_relative_to(folder)
    assert report["equal"]
    assert report["mask"]
    assert len(report["warnings"]) == 1, report["warnings"]
    assert re.search(reason, report["warnings"][0]), report["warnings"][0]
    assert re.match("RuntimeError: backend='cpu' was asked for, but .*" + reason, report["cpu"]), report["cpu"]
    for text in (report["warnings"][0], report["cpu"]):
        assert "pip install --no-build-isolation" in text, "says how to get it"


def test_without_the_extension(copied):
    report = json.loads(run(LAYER, path=copied))
    assert_runs_on_the_reference(report, copied, "has no compiled extension _C")


def test_the_source_folder_without_the_extension(copied):
    """As after `pip install .` and python started in the clone: what is said builds it where it was looked for."""
    (copied / "setup.py").touch()
    report = json.loads(run(LAYER, path=copied))
    command = f"pip install --no-build-isolation --no-deps --editable {re.escape(str(copied))}"
    assert_runs_on_the_reference(report, copied, f"has no compiled extension _C.* then {command}")


def test_with_an_extension_of_another_torch(copied, extension_file):
    """After an upgrade of torch: loading it may crash, so it must be refused before."""
    built, other = f"built for torch {torch.__version__.split('+')[0]}", "built for torch 1.99.0"
    binary = extension_file.read_bytes()
    assert built.encode() in binary
    other = other.ljust(len(built), "0")[: len(built)]
    (copied / PACKAGE.name / extension_file.name).write_bytes(binary.replace(built.encode(), other.encode()))
    report = json.loads(run(LAYER, path=copied))
    reason = f"was {re.escape(other)}, you have torch {re.escape(torch.__version__)}"
    assert_runs_on_the_reference(report, copied, reason)
    assert "mixout_kernels._C" not in report["modules"], "it was loaded"


def test_with_an_extension_that_does_not_load(copied, extension_file):
    tag = f"mixout_kernels built for torch {torch.__version__.split('+')[0]}\0"
    (copied / PACKAGE.name / extension_file.name).write_bytes(b"not a library " + tag.encode())
    report = json.loads(run(LAYER, path=copied))
    assert_runs_on_the_reference(report, copied, "does not load with torch")


@pytest.mark.skipif(not _extension.SOURCES.is_dir(), reason="the tests run without the source tree")
def test_with_an_extension_of_other_sources(copied, extension_file):
    """A clone after a pull: its Python files may ask for what the extension of before does not have."""
    shutil.copy(extension_file, copied / PACKAGE.name)
    (copied / "setup.py").touch()
    sources = shutil.copytree(_extension.SOURCES, copied / "csrc")
    assert json.loads(run(LAYER, path=copied))["warnings"] == []
    with (sources / "philox.h").open("a") as file:
        file.write("// changed\n")
    report = json.loads(run(LAYER, path=copied))
    reason = f"was built from other sources than are now in {re.escape(str(sources))}"
    assert_runs_on_the_reference(report, copied, reason)
    assert "mixout_kernels._C" not in report["modules"], "it was loaded"


def test_with_triton_blocked():
    code = "import sys; sys.modules['triton'] = None\n" + LAYER
    report = json.loads(run(code, path=PACKAGE.parent))
    assert report["equal"]
    assert report["mask"]
    assert report["triton"].startswith("RuntimeError: backend='triton' was asked for, but ")
    if _extension.load()[0] is not None:
        assert report["cpu"] is None
        assert report["warnings"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_backends_without_a_gpu_say_so():
    report = json.loads(run(LAYER, path=PACKAGE.parent))
    for backend in ("triton", "cuda"):
        assert report[backend].startswith(f"RuntimeError: backend='{backend}' was asked for, but ")
    assert report["warnings"] == ([] if _extension.load()[0] is not None else report["warnings"][:1])


def test_import_is_light_and_silent():
    """No compiler stack, no transformers, no backend: they are loaded when they are first used. No warning either."""
    code = """
        import sys, torch
        before, state = set(sys.modules), torch.random.get_rng_state()
        import mixout_kernels
        assert torch.equal(torch.random.get_rng_state(), state)
        print(*sorted(set(sys.modules) - before))
    """
    loaded = run(code, path=PACKAGE.parent, arguments=["-W", "error"]).split()
    ours = [name for name in loaded if name.startswith("mixout_kernels")]
    assert "mixout_kernels.functional" in ours
    assert not {"mixout_kernels._C", "mixout_kernels._cuda", "mixout_kernels.backends.triton"} & set(ours)
    assert not {"triton", "transformers", "torch._dynamo", "torch._inductor"} & set(loaded)
