"""Where the decisions for a weight [out, in] may lie: every fast path of a GPU kernel, and what has none."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mixout_kernels.draws import KINDS, Draw, strides_of

# (out, in) -> (strides, offset)
PLACEMENTS = {kind: partial(lambda kind, *shape: (strides_of(kind, shape), 0), kind) for kind in KINDS} | {
    "transposed": lambda out, features: ((1, out), 0),
    "second half of the rows": lambda out, features: ((features, 1), out * features),
    "second half of the columns": lambda out, features: ((2 * features, 1), features),
    "rows of an odd length": lambda out, features: ((features + 9, 1), 5),
    "columns from 8 on": lambda out, features: ((0, 1), 8),
    "columns from 5 on": lambda out, features: ((0, 1), 5),
    "columns beyond 2^33": lambda out, features: ((0, 1), 2**33 + 3),
    "rows from 5 on": lambda out, features: ((1, 0), 5),
    "every second row": lambda out, features: ((2, 0), 1),
    "every third column": lambda out, features: ((0, 3), 0),
    "neither stride 0 or 1": lambda out, features: ((3, 7), 11),
    "around the counter's 2^32": lambda out, features: ((2**33 + 4, 1), 2**34 - 64),
}
SHAPES = [(64, 128), (99, 63)]  # runs of four side by side in each row, or not


def draw_at(
    placement: str, shape: tuple[int, int], p: float = 0.5, seed: int | Tensor = 31, device: str = "cpu"
) -> Draw:
    strides, offset = PLACEMENTS[placement](*shape)
    return Draw(torch.as_tensor(seed).reshape(1).to(device), p, strides, offset)
