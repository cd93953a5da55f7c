"""What a sampler has to do with a model whose weights are DTensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from ...modules import MixedLayer
from ...pieces import is_distributed
from . import placing, tensor_parallel
from .gathering import Gathered, LayerDraw, Sampler, Sharded
from .kept_all_gather import GatheredKept, reason_against
from .kept_reduce_scatter import KeptReduceScatter
from .scratch import Scratch
from .units import Unit, check_group, groups_of, reshard


class Slot(Protocol):
    layer: MixedLayer

    @property
    def draw(self) -> LayerDraw: ...


class Shards:
    """The layers of a sampler whose targets lie where their weights lie, and what hangs on FSDP for them.

    Args:
        model: between two steps.
        slots: of the sampler, by the names of their layers.
        kept_all_gather: whole targets, and less to gather.
        group: whose processes have the sampler's masks.

    Raises:
        NotImplementedError: for a plan or a policy with which Phi cannot be made of pieces.
        ValueError: if a weight is sharded over processes that are not in the group.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, Slot],
        sampler: Sampler,
        kept_all_gather: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        reshard(model)
        self._slots = {name: slot for name, slot in slots.items() if is_distributed(slot.layer.weight)}
        self._sampler = sampler
        self._kept_all_gather = kept_all_gather
        self._shared = placing.shared_weights(model)
        names = {slot.layer: name for name, slot in self._slots.items()}
        _check_ranks({name: slot.layer for name, slot in self._slots.items()}, group)
        scratch = Scratch()
        self.units = [Unit(module, group, self._sharded(group, names), scratch) for module, group in groups_of(model)]
        of_fsdp = {layer.layer for unit in self.units for layer in unit.layers}
        of_tensor_parallelism = []
        for name, slot in self._slots.items():
            layer, weight = slot.layer, _weight(slot)
            if layer not in of_fsdp and id(weight) not in self._shared:
                tensor_parallel.check_plan(name, layer, weight.device_mesh, weight.placements)
                of_tensor_parallelism.append(layer)
        # Nothing was changed until here.
        for layer in of_tensor_parallelism:
            placing.place_own_piece(layer)
        self.comms = [KeptReduceScatter(unit) for unit in self.units if _can_reduce_kept(unit)]
        for unit in self.units:
            unit.within = _within(unit, self.units)
            unit.install()
        for comm in self.comms:
            comm.install()

    def take_out(self) -> None:
        for comm in self.comms:
            comm.uninstall()
        for unit in self.units:
            unit.uninstall()
        for slot in self._slots.values():
            slot.layer.gathered = None

    def make_targets_whole(self) -> None:
        """On every rank: their pieces are gathered."""
        for slot in self._slots.values():
            placing.make_whole(slot.layer)

    def _sharded(self, group: Any, names: dict[MixedLayer, str]) -> list[Sharded]:
        found: list[Sharded] = []
        for fsdp_param in group.fsdp_params:
            layer = fsdp_param._module_info.module
            if layer not in names or fsdp_param._module_info.param_name != "weight":
                continue
            if id(fsdp_param.sharded_param) in self._shared:
                continue  # mixed for this layer, it would be mixed for the other module
            found.append(self._sharded_layer(names[layer], layer, fsdp_param))
        if any(isinstance(layer, Gathered) for layer in found):
            check_group(group, [layer.name for layer in found])
        return found

    def _sharded_layer(self, name: str, layer: MixedLayer, fsdp_param: Any) -> Sharded:
        arguments = name, layer, fsdp_param, self._slots[name].draw, self._sampler
        if fsdp_param.is_dtensor:
            spec = getattr(fsdp_param, "_unsharded_dtensor_spec", None) or fsdp_param._tp_spec  # of older versions
            tensor_parallel.check_plan(name, layer, spec.mesh, spec.placements)
        if layer.target is None:  # its weight is needed in the kept columns alone
            return Sharded(*arguments)
        if self._kept_all_gather and reason_against(layer, fsdp_param) is None:
            return GatheredKept(*arguments)
        return Gathered(*arguments)


def _weight(slot: Slot) -> Any:
    return slot.layer.weight


def _check_ranks(layers: Mapping[str, MixedLayer], group: dist.ProcessGroup | None) -> None:
    """The pieces of a weight need one mask: its ranks must be in the group, and mix this layer alike."""
    own = {name: (_ranks_of(m.weight), m.p, m.grad_p, m.mask, m.rescale) for name, m in layers.items()}
    members = dist.get_process_group_ranks(group)
    told: list[dict[str, Any]] = [{}] * len(members)
    dist.all_gather_object(told, own, group=group)
    by_rank = dict(zip(members, told, strict=True))
    for rank, settings_by_name in by_rank.items():
        for name, settings in settings_by_name.items():
            for other in settings[0]:
                if other not in by_rank:
                    raise ValueError(
                        f"MixSampler: process_group: expected all ranks that the weight of {name!r} is sharded over, "
                        f"{list(settings[0])}, got a group without {other}"
                    )
                if by_rank[other].get(name) != settings:
                    raise ValueError(
                        f"MixSampler: model: expected {name!r} with the same settings on every rank, got "
                        f"{_settings(settings)} on rank {rank} and {_settings(by_rank[other].get(name))} on rank "
                        f"{other}. (Which layers are new, ranks without the checkpoint cannot tell: pass exclude= to "
                        "apply_mixout.)"
                    )


def _ranks_of(weight: Any) -> tuple[int, ...]:
    return tuple(weight.device_mesh.mesh.flatten().tolist())


def _settings(settings: Any) -> str:
    return "none" if settings is None else "p={}, grad_p={}, mask={!r}, rescale={}".format(*settings[1:])


def needs_pieces(model: nn.Module, layers: Iterable[MixedLayer]) -> bool:
    """Whether a layer cannot do with a whole target: the target is sharded, or tensor parallelism the weight."""
    of_fsdp = {id(p.sharded_param) for _, group in groups_of(model) for p in group.fsdp_params if not p.is_dtensor}
    return any(
        is_distributed(layer.target) or (is_distributed(layer.weight) and id(layer.weight) not in of_fsdp)
        for layer in layers
    )


def _can_reduce_kept(unit: Unit) -> bool:
    """Torch 2.9 and later let the communication be replaced, of modules that have one group."""
    state = unit.module._get_fsdp_state()
    one_group = len(getattr(state, "_fsdp_param_groups", [None])) == 1
    return bool(unit.layers) and one_group and hasattr(unit.module, "set_custom_reduce_scatter")


def _within(unit: Unit, units: Sequence[Unit]) -> list[Sharded]:
    """The layers to look after before this unit's forward: of its own, and if it is outermost of all units in it."""
    inside = {id(module) for top in unit.group.modules for module in top.modules()}
    if any(other is not unit and id(unit.module) in map(id, other.module.modules()) for other in units):
        return list(unit.layers)
    return [layer for other in units if id(other.module) in inside for layer in other.layers]
