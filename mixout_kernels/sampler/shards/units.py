"""FSDP2's units: the modules that ``fully_shard`` was given, with the mixed layers whose weights each of them gathers.

Phi stays unsharded after a forward without a backward (the root's, or with ``reshard_after_forward=False``), and so may
a weight. Each gather notes what it was made for, and a hook before that of FSDP reshards what the coming forward cannot
use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .gathering import Gathered, Sharded
from .scratch import Scratch

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Unit:
    def __init__(self, module: Any, group: Any, layers: Sequence[Sharded], scratch: Scratch) -> None:
        self.module = module
        self.scratch = scratch
        self.group = group  # FSDP's own: its parameters in the order of its buffers
        self.layers = layers
        self.within: Sequence[Sharded] = layers  # of a unit that is in no other: those of all units in it
        self._handles: list[Any] = []

    def install(self) -> None:
        start = 0
        for layer in self.layers:
            if isinstance(layer, Gathered):
                layer.scratch, layer.start = self.scratch, start
                start += layer.fsdp_param.padded_sharded_param_size.numel()
            layer.place_target()
            layer.attach()
            if isinstance(layer, Gathered):
                layer.layer.gathered = layer
                self._handles.append(layer.layer.register_forward_pre_hook(layer.check))
                self._handles.append(layer.layer.register_forward_hook(layer.check_backward))
        # FSDP's own hooks are not compiled either.
        prepare = torch.compiler.disable(self._prepare)
        self._handles += [module.register_forward_pre_hook(prepare, prepend=True) for module in self.group.modules]

    def uninstall(self) -> None:
        self._reshard()
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer.detach()

    def _prepare(self, module: nn.Module, _: Any) -> None:
        """Before FSDP gathers for a forward."""
        _check_compiled_autograd()
        for layer in self.layers:
            layer.prepare()
        if any(layer.is_stale() for layer in self.layers):
            self._reshard()
        for layer in self.within:  # those of units below may be gathered ahead, before the hook of their own unit
            layer.attach()

    def _reshard(self) -> None:
        if self.group.is_unsharded:
            self.module.reshard()


def reshard(model: nn.Module) -> None:
    """Brings the sharded Parameters back that a forward has left unsharded."""
    for module, group in groups_of(model):
        if group.is_unsharded:
            module.reshard()


def groups_of(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """FSDP's groups of parameters that are gathered together, each with a module that ``fully_shard`` was given."""
    from torch.distributed.fsdp import FSDPModule

    seen = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        # Older versions of torch have one group for each module.
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in groups:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield module, group


def check_group(group: Any, names: Sequence[str]) -> None:
    """
    Raises:
        NotImplementedError: if FSDP cannot gather Phi for this group.
    """
    remedy = "or make the MixSampler before fully_shard: targets are whole on every rank then"
    if group._use_post_forward_mesh:
        raise NotImplementedError(
            f"MixSampler: model: expected reshard_after_forward=True or False for the module with {names[0]!r}, got an "
            f"int: torch gathers Phi from all ranks alone; give True or False, {remedy}"
        )
    if type(group.offload_policy).__name__ == "CPUOffloadPolicy" and group.device.type != "cpu":
        raise NotImplementedError(
            f"MixSampler: model: expected no CPUOffloadPolicy for the module with {names[0]!r} on {group.device}, got "
            f"one: torch brings the weight to the device without what mixes it there; leave it out, {remedy}"
        )


def _check_compiled_autograd() -> None:
    """Torch 2.8 to 2.11 gather the weight itself, not Phi, in a backward under compiled autograd."""
    if _TORCH >= (2, 12) or not _compiled_autograd_is_on():
        return
    raise RuntimeError(
        f"MixSampler: expected no compiled autograd with sharded targets in torch {torch.__version__}, which would "
        "gather the weights themselves in backward: turn it off, or use torch 2.12 or later"
    )


def _compiled_autograd_is_on() -> bool:
    config = sys.modules.get("torch._dynamo.config")
    if config is not None and getattr(config, "compiled_autograd", False):
        return True
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))
