"""The shapes to measure, and the tensors of one layer of such a shape."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    rows: int
    in_features: int
    out_features: int
    dtype_name: str

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.in_features}x{self.out_features}-{self.dtype_name}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def operand_bytes(self) -> int:
        """The bytes of x, g, w and u."""
        m, k, n = self.rows, self.in_features, self.out_features
        return (m * k + m * n + 2 * n * k) * self.dtype.itemsize


# MiniLM's layers, then those of BERT-base and BERT-large.
_CPU = (
    Case(512, 384, 384, "fp32"),
    Case(512, 384, 1536, "fp32"),
    Case(512, 1536, 384, "fp32"),
    Case(2048, 768, 768, "fp32"),
    Case(2048, 3072, 768, "fp32"),
    Case(4096, 1024, 1024, "fp32"),
    Case(512, 384, 384, "bf16"),
    Case(2048, 768, 768, "bf16"),
)
_CPU_QUICK = (Case(512, 384, 384, "fp32"),)

_SIZES = (768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 1024), (3072, 3072), (4096, 4096)
_GPU_FULL = (
    *(Case(m, k, n, "bf16") for k, n in _SIZES for m in (16, 64, 256, 1024, 4096, 8192, 16384)),
    *(Case(m, k, n, "fp32") for k, n in ((768, 768), (1024, 1024), (4096, 4096)) for m in (64, 4096)),
)
# What the targets are of, and both sides of the rule that chooses a schedule.
_GPU = (
    *(Case(m, n, n, "bf16") for n in (1024, 4096) for m in (64, 256, 512, 4096, 8192)),
    *(Case(4096, k, n, "bf16") for k, n in ((1024, 4096), (4096, 1024))),
)
_GPU_QUICK = (Case(4096, 1024, 1024, "bf16"),)


def cases_for(device: str, quick: bool, full: bool) -> tuple[Case, ...]:
    if device == "cpu":
        return _CPU_QUICK if quick else _CPU
    return _GPU_QUICK if quick else _GPU_FULL if full else _GPU


@dataclass(frozen=True)
class Operands:
    """One layer's input, parameters, target and output gradient; x stands in the middle of a network."""

    x: Tensor  # [rows, in]
    weight: Tensor  # [out, in]
    target: Tensor  # [out, in]
    bias: Tensor  # [out]
    grad: Tensor  # [rows, out]

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> Operands:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device, generator=generator) * scale).to(case.dtype)

        m, k, n = case.rows, case.in_features, case.out_features
        target = normal(n, k, scale=k**-0.5)
        # A fine-tuned weight stays near the pretrained one.
        weight = target + normal(n, k, scale=0.1 * k**-0.5)
        x, bias, grad = normal(m, k), normal(n), normal(m, n)
        return cls(x.requires_grad_(), weight.requires_grad_(), target, bias.requires_grad_(), grad)

    def double(self) -> Operands:
        """Copy them in float64."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Operands(*(t.detach().double().requires_grad_(t.requires_grad) for t in tensors))

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.bias
