"""A model under FSDP2 beside its twin in one process: the same seed, the same batches, and the same bits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import mixout_kernels as mk
from mixout_kernels import backends
from mixout_kernels.pieces import local

from ..whole_model import models

LR = 0.0625  # a power of two: see ratio()


@functools.cache
def ratio() -> float:
    """By how much a gradient under FSDP exceeds the mean over ranks: torch 2.8 adds them over gloo."""
    whole = nn.Linear(4, 4)
    sharded = fully_shard(copy.deepcopy(whole))
    for layer in (whole, sharded):
        layer(torch.ones(1, 4)).sum().backward()
    return (full(sharded.bias.grad) / whole.bias.grad)[0].item()


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.GELU(), nn.Linear(*widths[1:]))


def layers(model: nn.Module) -> list[Any]:
    return list(models.mixed_layers(model).values())


class Twins:
    """``sharded`` on all ranks, ``alone`` on each of them."""

    def __init__(
        self,
        build: Callable[[], nn.Module] = models.mlp,
        *,
        units: Callable[[Any], Iterable[nn.Module]] = layers,
        sampler_first: bool = False,
        freeze: tuple[str, ...] = (),
        sampler: dict[str, Any] | None = None,
        then: Callable[[nn.Module], Any] = lambda model: None,
        between: Callable[[nn.Module], Any] = lambda model: None,
        p: float = 0.5,
        mask: str = "neuron",
        target_dtype: torch.dtype | None = None,
        **fsdp: Any,
    ) -> None:
        backends.load("cpu")._HAS_PRODUCT = False  # whose order of summation is another one than F.linear's
        self.ratio = ratio()
        self.alone = models.with_mixout(build(), p=p, mask=mask, target_dtype=target_dtype)
        then(self.alone)
        for name in freeze:
            self.alone.get_submodule(name).requires_grad_(False)
        self.sharded: Any = copy.deepcopy(self.alone)
        self.samplers = [mk.MixSampler(self.alone, seed=3)]
        make = functools.partial(mk.MixSampler, self.sharded, seed=3, **(sampler or {}))
        if sampler_first:
            self.samplers.append(make())
        for unit in (*units(self.sharded), self.sharded):
            fully_shard(unit, **fsdp)
        between(self.sharded)
        if not sampler_first:
            self.samplers.append(make())
        self.optimize(torch.optim.SGD)

    def optimize(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        scale = self.ratio if optimizer is torch.optim.SGD else 1
        self.optimizers = [
            optimizer([p for p in model.parameters() if p.requires_grad], lr)
            for model, lr in ((self.alone, LR * scale), (self.sharded, LR))
        ]

    @property
    def pair(self) -> tuple[nn.Module, Any]:
        return self.alone, self.sharded

    def train(self, steps: int = 3, micro: int = 1) -> dict[str, bool]:
        """What of losses and gradients is the same, bit for bit, after so many steps."""
        same = {"losses": True, "gradients": True}
        for step in range(steps):
            self.zero_grad()
            losses = [self._losses(model, step, micro) for model in self.pair]
            same["losses"] &= torch.equal(*losses)
            same["gradients"] &= self.gradients_equal()
            for optimizer in self.optimizers:
                optimizer.step()
        return same

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:  # a module whose weights lie unsharded knows nothing of the shards' gradients
            optimizer.zero_grad()

    def _losses(self, model: nn.Module, step: int, micro: int) -> Tensor:
        losses = []
        for number in range(micro):
            losses.append(self.loss(model.train(), 10 * step + number))
            losses[-1].backward()
        return torch.stack(losses).detach()

    def loss(self, model: nn.Module, number: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        first = next(layer for layer in model.modules() if isinstance(layer, mk.MixLinear | mk.MixConv1D))
        width = first.nx if isinstance(first, mk.MixConv1D) else first.in_features
        return model(torch.randn(8, width, generator=generator)).float().square().mean()

    def gradients_equal(self) -> bool:
        ours = dict(self.sharded.named_parameters())
        equal = True
        for name, parameter in self.alone.named_parameters():
            if parameter.grad is None:
                equal &= ours[name].grad is None
            else:  # a collective, so without a shortcut
                equal &= torch.equal(parameter.grad * self.ratio, full(ours[name].grad))
        return equal

    def target_bytes(self) -> tuple[int, int]:
        """Of this rank, and of the whole model."""
        of_rank, whole = (
            [local(layer.target).nbytes for layer in layers(model)] for model in (self.sharded, self.alone)
        )
        return sum(of_rank), sum(whole)


def all_of(comparisons: Iterable[bool]) -> bool:
    """``all`` without a shortcut: every rank must take part in the collectives of each of them."""
    return not list(comparisons).count(False)


def error_of(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def save(twins: Twins, folder: str) -> None:
    """The sharded one's model, optimizer and sampler, by torch.distributed.checkpoint."""
    model, optimizer = get_state_dict(twins.sharded, twins.optimizers[1])
    dcp.save({"model": model, "optimizer": optimizer, "sampler": twins.samplers[1].state_dict()}, checkpoint_id=folder)


def resumed_from(folder: str, saved: Twins) -> Twins:
    """A fresh sharded attention net that has loaded what was saved, beside the twin that was never interrupted."""
    resumed = Twins(models.attention_net, p=0.7)
    resumed.optimize(torch.optim.AdamW)
    model, optimizer = get_state_dict(resumed.sharded, resumed.optimizers[1])
    state = {"model": model, "optimizer": optimizer, "sampler": {"seed": 99, "step": 0}}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        resumed.sharded, resumed.optimizers[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    resumed.samplers[1].load_state_dict(state["sampler"])
    resumed.alone, resumed.optimizers[0] = saved.alone, saved.optimizers[0]
    return resumed
