"""Small models with mixout, and what a sampler's step must compute: the plain model over the mixed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mixout_kernels as mk

from .. import budget

IN, HIDDEN, OUT = 48, 40, 8


class Attention(nn.Module):
    """Three layers that read the same activation, under the names of BERT."""

    def __init__(self, width: int = IN) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.query(x) * self.key(x)) + self.value(x)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))


def attention_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, IN), Attention(), nn.Linear(IN, OUT))


def with_mixout(model: nn.Module, *, p: float = 0.5, device: str = "cpu", **options: Any) -> nn.Module:
    """With mixout, in training mode, and with weights away from their targets: there the masks change the result."""
    model.to(device)
    mk.apply_mixout(model, p=p, **options)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(device))
    return model.train()


def mixed_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (mk.MixLinear, mk.MixConv1D))}


def seeds_of(model: nn.Module) -> dict[str, int]:
    """The seed of every layer's present mask."""
    return {name: int(layer.slot.seed) for name, layer in mixed_layers(model).items()}


def mask_of(layer: nn.Module) -> Tensor:
    """A layer's present mask, in the weight's [out, in] shape."""
    weight = layer.weight.t() if isinstance(layer, mk.MixConv1D) else layer.weight
    keep = mk.reference.keep_mask(int(layer.slot.seed), p=layer.p, shape=weight.shape, mask=layer.mask)
    return keep.expand(weight.shape)


@dataclass
class Results:
    output: Tensor
    gradients: dict[str, Tensor]

    def assert_same_bits(self, other: Results) -> None:
        assert torch.equal(self.output, other.output)
        assert self.gradients.keys() == other.gradients.keys()
        for name, gradient in self.gradients.items():
            assert torch.equal(gradient, other.gradients[name]), name


def run(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> Results:
    """Forward and backward: the output, and the gradient of every parameter."""
    model.zero_grad()
    output = (call or model)(x)
    output.float().square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Results(output.detach(), gradients)


def reference_run(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Results:
    """``run`` of the plain model over the weights that ``reference.mixout`` mixes with the sampler's present seeds."""
    plain = copy.deepcopy(model)
    for layer in mixed_layers(plain).values():
        layer.grad_p = 0.0  # which remove_mixout leaves to remove_graddrop
    mk.remove_mixout(plain)
    plain.to(dtype=dtype)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
    weights = dict(leaves)
    for name, layer in mixed_layers(model).items():
        target, seed = None if layer.target is None else layer.target.to(dtype=dtype), layer.slot.seed.clone()
        settings = {"p": layer.p, "grad_p": layer.grad_p, "rescale": layer.rescale, "mask": layer.mask}
        # A Conv1D lies as [in, out] in memory; the neuron axis is the input's all the same.
        target, leaf = (None if t is None else layer.matrix(t) for t in (target, leaves[f"{name}.weight"]))
        weights[f"{name}.weight"] = layer.matrix(mk.reference.mixout(leaf, target, seed=seed, **settings))
    output = torch.func.functional_call(plain, weights, (x.to(dtype=dtype) if x.is_floating_point() else x,))
    output.square().sum().backward()
    return Results(output.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


class _Alone:
    """In the place of a slot: a layer's mask and nothing else."""

    def __init__(self, layer: nn.Module, seed: Tensor) -> None:
        self.layer, self.seed = layer, seed

    def again(self, *_: Any) -> None:
        """No call is like the last one."""

    def __call__(self, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        settings = {name: getattr(self.layer, name) for name in ("p", "grad_p", "rescale", "mask")}
        return mk.mix_linear(input, weight, target, bias, seed=self.seed, **settings)


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """With the sampler's present seeds, but every layer for itself: nothing mixed ahead, nothing shared."""
    layers = mixed_layers(model).values()
    slots = [layer.slot for layer in layers]

    for layer in layers:
        layer.slot = _Alone(layer, layer.slot.seed.clone())
    try:
        yield
    finally:
        for layer, slot in zip(layers, slots, strict=True):
            layer.slot = slot


def assert_in_budget(ours: Results, torchs: Results, truth: Results) -> None:
    """The suite's error budget for a whole model, where no magnitude is known element by element: in the 2-norm.

    A result has passed as many layers as the model has, so its rounding band counts them.
    """
    pairs = {"output": (ours.output, torchs.output, truth.output)}
    assert ours.gradients.keys() == truth.gradients.keys()
    for name in truth.gradients:
        pairs[name] = (ours.gradients[name], torchs.gradients[name], truth.gradients[name])
    depth = len(truth.gradients)
    for name, (result, torch_result, exact) in pairs.items():
        error, torch_error = (result.double() - exact).norm(), (torch_result.double() - exact).norm()
        band = budget.BAND * depth * torch.finfo(result.dtype).eps * exact.norm()
        assert error <= 2 * torch_error + band, f"{name}: {error:.2e}, PyTorch {torch_error:.2e}, band {band:.2e}"


def random_input(rows: int = 6, width: int = IN, device: str = "cpu") -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)).to(device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).float().square().mean().backward()
    optimizer.step()
