"""The ways to regularise the same training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal
from unittest import mock

from torch import nn

from benchmarks.baselines import apply_plain_mixout
from mixout_kernels import MixSampler, apply_mixout, backends

Kind = Literal["dropout", "none", "plain", "staged", "layers", "sampler", "premix", "triton"]
Mode = Literal["eager", "compiled", "graph"]


@dataclass(frozen=True)
class Variant:
    kind: Kind
    p: float = 0.0
    mode: Mode = "eager"

    @property
    def name(self) -> str:
        names = {
            "dropout": "dropout 0.1",
            "none": "no regularisation",
            "plain": "plain formula",
            "staged": "mixout_kernels, products of nn.Linear",
            "layers": "mixout_kernels, layer by layer",
            "sampler": "mixout_kernels, sampler",
            "premix": "mixout_kernels, sampler, premix=True",
            "triton": "mixout_kernels, sampler, Triton",
        }
        name = f"torch.compile({names[self.kind]})" if self.mode == "compiled" else names[self.kind]
        return name + (f", p={self.p:g}" if self.p else "") + (", CUDA graph" if self.mode == "graph" else "")

    @property
    def eager(self) -> Variant:
        return replace(self, mode="eager")

    @property
    def ours(self) -> bool:
        return self.kind in ("staged", "layers", "sampler", "premix", "triton")

    def prepare(self, model: nn.Module) -> None:
        """Changes a model with its pretrained weights, in place; "dropout" leaves it as it is."""
        if self.kind == "none":
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        elif self.kind == "plain":
            apply_plain_mixout(model, p=self.p)
        elif self.ours:
            apply_mixout(model, p=self.p)

    def sampler(self, model: nn.Module) -> MixSampler | None:
        """For a prepared model."""
        if self.kind not in ("sampler", "premix", "triton"):
            return None
        return MixSampler(model, premix=True if self.kind == "premix" else None)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """The CPU backend without its own product, to show what mixout saves by itself; Triton where CUDA is built."""
        if self.kind == "staged":
            with mock.patch.object(backends.load("cpu"), "schedules", return_value=("staged",)):
                yield
        elif self.kind == "triton":
            with mock.patch.dict(backends.PREFERENCE, cuda=("triton",)):
                yield
        else:
            yield


def all_variants() -> list[Variant]:
    """The plain formula costs the same for every p, so it runs at one; the eager step with dropout comes first."""
    found = [Variant("dropout"), Variant("none"), Variant("plain", 0.7), Variant("plain", 0.7, "compiled")]
    for p in (0.7, 0.9):
        found += [Variant("staged", p), Variant("layers", p), Variant("sampler", p), Variant("premix", p)]
    found += [Variant("triton", 0.7), Variant("dropout", mode="compiled"), Variant("sampler", 0.7, "compiled")]
    captured: list[tuple[Kind, float]] = [("dropout", 0.0), ("sampler", 0.7), ("sampler", 0.9), ("triton", 0.7)]
    return [*found, *(Variant(kind, p, "graph") for kind, p in captured)]
