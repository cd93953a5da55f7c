"""The ways to train that are compared: how the step is regularised, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

import mixout_kernels as mk
from benchmarks.common.methods import Method
from benchmarks.common.rows import Fact

Kind = Literal["dropout", "none", "plain", "staged", "layers", "sampler", "premix", "triton"]
Mode = Literal["eager", "compiled", "graph"]
Precision = Literal["float32", "bfloat16", "float16", "medium"]
Attention = Literal["sdpa", "eager"]

_NAMES: dict[Kind, str] = {
    "dropout": "dropout 0.1",
    "none": "no regularisation",
    "plain": "plain formula",
    "staged": "mixout_kernels, GEMMs of nn.Linear",
    "layers": "mixout_kernels, layer by layer",
    "sampler": "mixout_kernels, sampler",
    "premix": "mixout_kernels, sampler, premix=True",
    "triton": "mixout_kernels, sampler, Triton",
}


@dataclass(frozen=True)
class Variant:
    kind: Kind
    p: float = 0.0
    mode: Mode = "eager"
    precision: Precision = (
        "float32"  # bfloat16, float16: under autocast; medium: float32 by set_float32_matmul_precision
    )
    attention: Attention = "sdpa"

    @property
    def name(self) -> str:
        name = _NAMES[self.kind]
        name = f"torch.compile({name})" if self.mode == "compiled" else name
        name += f", p={self.p:g}" if self.p else ""
        name += {"bfloat16": ", bf16", "float16": ", fp16", "medium": ", medium"}.get(self.precision, "")
        name += ", eager attention" if self.attention == "eager" else ""
        return name + (", CUDA graph" if self.mode == "graph" else "")

    @property
    def trained(self) -> Variant:
        """The variant whose weights it trains: a CUDA graph those of the eager steps."""
        return replace(self, mode="eager") if self.mode == "graph" else self

    @property
    def dropout_alike(self) -> Variant:
        """The step with dropout that is run in the same way."""
        return replace(self, kind="dropout", p=0.0)

    @property
    def ours(self) -> bool:
        return self.kind not in ("dropout", "none", "plain")

    def prepare(self, model: nn.Module) -> None:
        """Change a model with its pretrained weights, in place; "dropout" leaves it as it is."""
        Method("mixout" if self.ours else self.kind, self.p).prepare(model)

    def sampler(self, model: nn.Module) -> mk.MixSampler | None:
        """Make the sampler of a prepared model."""
        if self.kind not in ("sampler", "premix", "triton"):
            return None
        return mk.MixSampler(model, premix=True if self.kind == "premix" else None)

    def kernels(self) -> AbstractContextManager[None]:
        """Choose "staged", to show what mixout saves by itself, or Triton where the CUDA kernels are built."""
        return mk.kernels(
            schedule="staged" if self.kind == "staged" else None, backend="triton" if self.kind == "triton" else None
        )

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """Enter the low precision of forward."""
        low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)
        return torch.autocast(device, low or torch.bfloat16, enabled=low is not None)

    @contextmanager
    def matmul_precision(self) -> Iterator[None]:
        """Set torch's precision of float32 products, of forward and backward."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.precision == "medium" else before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def facts(self) -> dict[str, Fact]:
        """Describe it in the columns of the CSV."""
        return {
            "kind": self.kind,
            "p": self.p,
            "run": self.mode,
            "precision": self.precision,
            "attention": self.attention,
        }


def all_variants(precisions: tuple[Precision, ...], attentions: tuple[Attention, ...]) -> list[Variant]:
    """List every step. The plain formula costs the same for every p, so it runs at one."""
    found = [Variant("dropout"), Variant("dropout", mode="compiled"), Variant("none")]
    found += [Variant("plain", 0.7), Variant("plain", 0.7, "compiled")]
    for p in (0.7, 0.9):
        found += [Variant(kind, p) for kind in ("staged", "layers", "sampler", "premix")]
    found += [Variant("triton", 0.7), Variant("sampler", 0.7, "compiled"), Variant("dropout", mode="graph")]
    found += [Variant(kind, p, "graph") for kind, p in (("sampler", 0.7), ("sampler", 0.9), ("triton", 0.7))]
    return [
        replace(variant, precision=precision, attention=attention)
        for precision in precisions
        for attention in attentions
        for variant in found
    ]
