"""What README.md and the pages of docs/ say, held to what is there: their blocks run, their links lead somewhere."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixout_kernels as mk

from .conftest import ROOT, make_targets
from .finetune.conftest import save_checkpoint

REPOSITORY = "https://github.com/mixout-kernels/mixout_kernels/blob/main/"
RAW = "https://raw.githubusercontent.com/mixout-kernels/mixout_kernels/main/"
DOCUMENTATION = "https://mixout-kernels.github.io/mixout_kernels/"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))

# Pages whose Python is run. The other recipes show the scripts of examples/, which tests/test_examples.py runs.
RUN = (
    "README.md",
    "docs/index.md",
    "docs/recipes/checkpoints.md",
    "docs/recipes/layers.md",
    "docs/recipes/parameters.md",
)

if not (ROOT / "README.md").exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks are run: the bert-large-uncased that they load is a BERT of two small layers.

    It is in a folder of that name, where transformers looks before it asks the hub: nothing is patched.
    """
    folder = tmp_path_factory.mktemp("readme")
    save_checkpoint(folder / "bert-large-uncased")
    save_checkpoint(folder / "path" / "of" / "the" / "pretrained" / "checkpoint")
    return folder


def given_names(folder):
    """What a block may use without making it, since the text around it does: one layer's tensors, and a model."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "mk": mk,
        "p": 0.7,
        "x": torch.randn(3, 20),
        "weight": torch.randn(7, 20),
        "target": torch.randn(7, 20),
        "bias": torch.randn(7),
        "linear": nn.Linear(20, 7),
        "query": torch.randn(5, 1, 768),
        "key": torch.randn(5, 1, 768),
        "value": torch.randn(5, 1, 768),
        "model": AutoModelForSequenceClassification.from_pretrained(folder / "bert-large-uncased"),
        "state": {"seed": 5, "step": 2},
    }


@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run_in_their_order(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = given_names(folder)
    found = blocks(page, "python")
    assert found
    for number, block in enumerate(found, start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_python_blocks_of_the_other_pages_are_python():
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python"), start=1):
            compile(block, f"{page}, block {number}", "exec")


def test_recipes_show_every_example():
    """By a line that ruff would format, and break, in a block marked as python: these are marked otherwise."""
    shown = [
        name
        for page in PAGES
        for name in re.findall(r'^--8<-- "(examples/.+)"$', (ROOT / page).read_text(), re.MULTILINE)
    ]
    assert sorted(shown) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("[!_]*.py"))


def test_make_targets_exist():
    targets = make_targets()
    for page in ("README.md", "CONTRIBUTING.md", "RELEASE.md", *PAGES):
        text = (ROOT / page).read_text()
        commands = re.findall(r"`(make [^`]+)`", text)
        commands += [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("make ")]
        for command in commands:
            words = re.sub(r"#.*|\w+=(\"[^\"]*\"|\S*)|(?<!\S)-\w+", "", command).split()[1:]
            assert set(words) <= targets, f"{page}: {command}"


def test_links_of_the_readme_work_on_a_package_index():
    """There nothing lies beside it, so a link has to be a whole address; those of this project name something here."""
    for link in links("README.md"):
        assert link.startswith("https://"), f"{link}: expected a whole address"
        for address in (REPOSITORY, RAW):
            if link.startswith(address):
                assert (ROOT / link.removeprefix(address).partition("#")[0]).exists(), link
        if link.startswith(DOCUMENTATION):
            page = link.removeprefix(DOCUMENTATION).partition("#")[0].strip("/") or "index"
            assert f"docs/{page}.md" in PAGES, link


def test_the_picture_has_its_figures():
    """`make picture` finds what it draws in the committed results, the pale bars longer than those in front of them."""
    pytest.importorskip("matplotlib")
    from tools import readme_picture

    bars, machine = readme_picture.read(ROOT / "benchmarks" / "results" / "step" / "minilm.csv")
    assert bars[0].ratio == 1
    assert [bar.pale is not None for bar in bars] == [False, False, False, True, True]
    assert all(bar.ratio < bar.pale for bar in bars if bar.pale is not None)
    assert "torch 2." in machine


# --- the documentation ------------------------------------------------------------------------------------------------


def test_every_public_name_is_documented():
    shown = re.findall(r"^::: mixout_kernels\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted([*mk.__all__, *mk._ON_DEMAND])
    assert all(getattr(mk, name).__doc__ for name in shown if name != "DEFAULT_HEADS")


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    from tools.docstrings import to_markdown

    text = """Mixes as :func:`mixout_kernels.mixout`, not as :meth:`Backend.mix`.

.. code-block:: text

    y = x Phi^T

Args:
    weight, target: ``[out, in]``; see
        :func:`mixout`.
    p: a number.
"""
    expected = """Mixes as [`mixout`][mixout_kernels.mixout], not as `Backend.mix`.

```text
y = x Phi^T
```

Args:
    weight: ``[out, in]``; see
        [`mixout`][mixout_kernels.mixout].
    target: ``[out, in]``; see
        [`mixout`][mixout_kernels.mixout].
    p: a number."""
    assert to_markdown(text, {"mixout"}) == expected
