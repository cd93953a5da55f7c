"""The ways to regularise a fine-tuning that are compared, mixout by the plain formula among them.

The plain formula is mixout as one would write it in PyTorch from the paper, without this package's kernels. Each
forward draws the mask, writes Phi with plain tensor operations and calls ``F.linear``; autograd does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixout_kernels import MixLinear, apply_mixout
from mixout_kernels.draws import Mask, strides_of

Kind = Literal["dropout", "none", "plain", "mixout"]


@dataclass(frozen=True)
class Method:
    """One way to regularise the same training."""

    kind: Kind
    p: float = 0.0
    mask: Mask = "neuron"

    @property
    def name(self) -> str:
        return {
            "dropout": "dropout",
            "none": "no regularisation",
            "plain": f"plain formula, p={self.p:g}",
            "mixout": f"mixout_kernels, p={self.p:g}",
        }[self.kind]

    def prepare(self, model: nn.Module) -> None:
        """Change a model with its pretrained weights, in place; "dropout" leaves it with the rates of its config."""
        if self.kind == "none":
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        elif self.kind == "plain":
            apply_plain_mixout(model, p=self.p, mask=self.mask)
        elif self.kind == "mixout":
            apply_mixout(model, p=self.p, mask=self.mask)


def plain_mixout(weight: Tensor, target: Tensor, p: float, mask: str, axis: int = 1) -> Tensor:
    """``Phi = u + M * (w - u) / (1 - p)`` (Lee, Cho & Kang, ICLR 2020, eq. 4); ``axis`` is that of the inputs."""
    strides = strides_of(mask, weight.shape, axis)
    shape = [size if stride else 1 for size, stride in zip(weight.shape, strides, strict=True)]
    keep = torch.bernoulli(torch.full(shape, 1 - p, device=weight.device)).bool()
    return torch.where(keep, target + (weight - target) / (1 - p), target)


class PlainMixLinear(nn.Linear):
    """``nn.Linear`` with mixout by the plain formula. It takes over the Parameters of the layer it is made from."""

    target: Tensor

    def __init__(self, linear: nn.Linear, target: Tensor, *, p: float, mask: str = "neuron") -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.p, self.mask = p, mask
        self.register_buffer("target", target, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        return F.linear(input, plain_mixout(self.weight, self.target, self.p, self.mask), self.bias)


class PlainMixConv1D(nn.Module):
    """transformers' ``Conv1D``, whose weight lies as ``[in, out]``, with mixout by the plain formula."""

    target: Tensor

    def __init__(self, conv: nn.Module, target: Tensor, *, p: float, mask: str = "neuron") -> None:
        super().__init__()
        self.weight, self.bias = conv.get_parameter("weight"), conv.get_parameter("bias")
        self.p, self.mask = p, mask
        self.register_buffer("target", target, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        phi = plain_mixout(self.weight, self.target, self.p, self.mask, axis=0) if self.training else self.weight
        return F.linear(input, phi.t(), self.bias)


def apply_plain_mixout(model: nn.Module, *, p: float, mask: str = "neuron") -> list[str]:
    """Put the plain formula into the very layers that ``apply_mixout`` chooses, in place, and return their names."""
    report = apply_mixout(model, p=p, mask=mask)
    replaced: dict[int, nn.Module] = {}
    for name in report.mixed:
        mixed = model.get_submodule(name)
        if id(mixed) not in replaced:
            plain_class = PlainMixLinear if isinstance(mixed, MixLinear) else PlainMixConv1D
            replaced[id(mixed)] = plain_class(mixed, mixed.target, p=p, mask=mask)
        model.set_submodule(name, replaced[id(mixed)])
    return list(report.mixed)
