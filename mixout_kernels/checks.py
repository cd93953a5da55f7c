"""What a call may mean: every check of the arguments of the public functions, and the text of its error.

A message names the function and the argument, what was expected and what came. What a backend cannot do is not checked
here: the backend says it (``backends/contract.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .draws import KINDS, fresh_seed


def mixout(
    name: str, weight: Tensor, target: Tensor | None, p: float, mask: str, grad_p: float = 0.0, rescale: bool = True
) -> None:
    """The errors that a call with these would raise; for modules, which hold them long before the first call."""
    probability(name, "p", p)
    if grad_p != 0.0:
        probability(name, "grad_p", grad_p)
    kind(name, mask)
    flag(name, "rescale", rescale)
    weight_and_target(name, weight, target)


def probability(name: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument}: expected a number in [0, 1], got {type(value).__name__}")
    if not 0 <= value <= 1:  # also NaN
        raise ValueError(f"{name}: {argument}: expected a number in [0, 1], got {value}")


def at_least_zero(name: str, argument: str, value: object, expected: str = "a finite number >= 0") -> None:
    """``expected``: where something else than a number would do too, what."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument}: expected {expected}, got {value!r}")
    if not 0 <= value < math.inf:  # also NaN
        raise ValueError(f"{name}: {argument}: expected {expected}, got {value}")


def module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: model: expected an nn.Module, got {type(value).__name__}")


def kind(name: str, mask: object) -> None:
    if not isinstance(mask, str) or mask not in KINDS:
        raise ValueError(f"{name}: mask: expected one of {', '.join(map(repr, KINDS))}, got {mask!r}")


def flag(name: str, argument: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name}: {argument}: expected True or False, got {value!r}")


def string(name: str, argument: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: {argument}: expected a string, got {value!r}")


def choice(name: str, argument: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def axis(name: str, value: object, dimensions: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: axis: expected an int or None, got {type(value).__name__}")
    if not 0 <= value < dimensions:
        raise ValueError(f"{name}: axis: expected a dimension of the weight, 0 to {dimensions - 1}, got {value}")


def shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: shape: expected a sequence of sizes, got {type(value).__name__}")
    sizes = tuple(value)
    if not sizes or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise ValueError(f"{name}: shape: expected one or more sizes >= 0, got {sizes}")
    return sizes


def tensor(name: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: {argument}: expected a floating-point tensor, got {value.dtype}")


def weight_and_target(name: str, weight: Tensor, target: Tensor | None) -> None:
    tensor(name, "weight", weight)
    if weight.dim() == 0:
        raise ValueError(f"{name}: weight: expected one dimension or more, got a scalar")
    if target is None:
        return
    tensor(name, "target", target)
    if target.shape != weight.shape:
        raise ValueError(f"{name}: target: expected the weight's shape {list(weight.shape)}, got {list(target.shape)}")
    if target.device != weight.device:
        raise ValueError(f"{name}: target: expected the weight's device {weight.device}, got {target.device}")
    if target.dtype != weight.dtype and target.dtype.itemsize >= weight.dtype.itemsize:
        raise TypeError(
            f"{name}: target: expected the weight's dtype {weight.dtype} or a narrower one, got {target.dtype}"
        )
    if target.requires_grad:
        raise ValueError(f"{name}: target: expected a frozen tensor, got one that requires grad; use target.detach()")


def linear(name: str, input: Tensor, weight: Tensor, bias: Tensor | None, casts: Callable[[Tensor], bool]) -> None:
    """``casts``: whether autocast is on for a tensor, so that dtypes need not agree."""
    tensor(name, "input", input)
    if input.is_nested:
        raise TypeError(
            f"{name}: input: expected a dense tensor, got a nested one; of a jagged one give the values, and make "
            "torch.nested.nested_tensor_from_jagged(y, input.offsets()) of the result"
        )
    if input.layout is not torch.strided:
        raise TypeError(f"{name}: input: expected a dense tensor, got one with layout {input.layout}")
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight: expected [out, in], got {list(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: input: expected [..., {weight.shape[1]}] for a weight {list(weight.shape)}, "
            f"got {list(input.shape)}"
        )
    if input.device != weight.device:
        raise ValueError(f"{name}: input: expected the weight's device {weight.device}, got {input.device}")
    autocast = casts(input)
    if input.dtype != weight.dtype and not autocast:
        raise TypeError(f"{name}: input: expected the weight's dtype {weight.dtype}, got {input.dtype}")
    if bias is None:
        return
    tensor(name, "bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"{name}: bias: expected the weight's device {weight.device}, got {bias.device}")
    if bias.dtype != weight.dtype and not autocast:
        raise TypeError(f"{name}: bias: expected the weight's dtype {weight.dtype}, got {bias.dtype}")


def seed_tensor(name: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as an int64 tensor with one element on this device; None draws one from torch's default generator."""
    if seed is None:
        return fresh_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"{name}: seed: expected an int64 tensor with one element, got {seed.dtype} {list(seed.shape)}"
            )
        if seed.device != device:
            raise ValueError(f"{name}: seed: expected a tensor on {device}, got one on {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name}: seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name}: seed: expected 64 bits, got {seed}")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
