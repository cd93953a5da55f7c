"""The page about the neighbours: every line of its table, and every block, does what it says on a small BERT."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk

from ..conftest import ROOT
from .models import bert, padded_batch

PAGE = ROOT / "docs" / "neighbours.md"
if not PAGE.exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = {
    row[0].strip(): re.findall(r"`([^`]*mk\.[^`]*|torch\.nn[^`]*)`", row[1])
    for row in re.findall(r"^\| (.+?) \| (.+) \|$", TEXT, re.M)
}


def names(model):
    return {
        "mk": mk,
        "math": math,
        "torch": torch,
        "F": F,
        "model": model,
        "batches": [padded_batch()],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-5),
        "steps_per_epoch": 3,
        "k": 2,
    }


@pytest.mark.parametrize("row", [name for name, code in ROWS.items() if code])
def test_a_line_of_the_table(row):
    """It trains for two steps; "the same" stands on the line before, so such a line runs what it adds."""
    model = bert().train()
    found = names(model)
    code = ROWS[row]
    if not any("apply" in line or "decay" in line or "spectral" in line for line in code):
        mk.apply_graddrop(model, p=0.5)  # "the same, MixSampler(...)"
    for line in code:
        exec(line, found)
    optimizer = found["optimizer"] if "decay" in str(code) else torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**padded_batch()).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()


def test_the_blocks():
    model = bert().train()
    found = names(model)
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, found)
    assert {layer.p for layer in model.modules() if isinstance(layer, mk.MixLinear)} == {0.9, 0.5}
