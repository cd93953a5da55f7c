"""The dropout GEMM of quack-kernels (0.6.5), forward only: it has no backward and no layer of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from quack.epilogue import gemm_epilogue  # type: ignore[import-not-found]
from quack.epilogue.ops import RowVecLoad  # type: ignore[import-not-found]
from quack.operand_transform import dropout_a  # type: ignore[import-not-found]
from torch import Tensor


# The mask does not rescale. The bias is pinned to the columns: a square product would leave it ambiguous.
@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _scaled_with_bias(acc: Any, scale: Any, bias: Any) -> dict[str, Any]:
    return {"D": acc * scale + bias}


@functools.cache
def _transform(p: float) -> Any:
    return dropout_a(p)


def dropout_linear(x: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    """``F.linear(F.dropout(x, p), weight, bias)`` with the mask made inside the product; p in steps of 1/256."""
    seed_and_offset = torch.randint(2**62, (2,), dtype=torch.int64, device=x.device)
    return _scaled_with_bias(
        x.detach(),
        weight.detach().t(),
        scale=1 / (1 - p),
        bias=bias.detach()[None],
        transform_a=_transform(p),
        transform_operands={"seed": seed_and_offset},
    )["D"]
