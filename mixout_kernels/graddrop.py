"""GradDrop and its relatives: masks on the gradients of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import checks
from .draws import Mask, decides_once
from .evidence import DEFAULT_HEADS, own_patterns
from .gradient_masks import Block, Drawn, Fixed, GradientMasks, Place, gradient_masks_of
from .modules import MixedLayer, is_conv1d, to_mixed, to_plain
from .patterns import Rates, each_must_match, matches, patterns
from .selection import reason_of_class


@dataclass
class GradDropReport:
    """What :func:`apply_graddrop` did: ``str(report)`` is a table.

    Attributes:
        layers: name of each layer whose kernel masks its weight's gradient, and how.
        hooks: name of each parameter whose gradient is masked by a hook, and how.
        blocks: name of each block of ``mask="layer"``, and its p.
        skipped: name of each parameter whose gradient stays whole, and why.
    """

    layers: dict[str, str] = field(default_factory=dict)
    hooks: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = {"layer": self.layers, "hook": self.hooks, "block": self.blocks, "skipped": self.skipped}
        width = max((len(name) for found in kinds.values() for name in found), default=0)
        lines = [
            f"{kind:8} {name:{width}}  {detail}" for kind, found in kinds.items() for name, detail in found.items()
        ]
        counts = ", ".join(f"{len(found)} {kind}{'' if kind == 'skipped' else 's'}" for kind, found in kinds.items())
        return "\n".join([f"graddrop: {counts}", *lines])


@dataclass
class _Matched:
    """A Parameter whose gradient is to be masked."""

    name: str
    place: Place
    p: float
    layer: nn.Module | None  # the linear layer that alone reads it as its weight
    layer_name: str


def apply_graddrop(
    model: nn.Module,
    *,
    p: float | Mapping[str, float] | None = None,
    mask: Mask = "neuron",
    rescale: bool = True,
    keep: Mapping[str, Tensor] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = DEFAULT_HEADS,
) -> GradDropReport:
    r"""Drops a random part of each parameter's gradient, in place: GradDrop (arXiv 2307.10098, in our reading).

    .. code-block:: text

        g <- M * g / (1 - p)        E M = 1 - p

    before the optimizer sees it. Forward, evaluation, checkpoints and dropout rates stay what they are. ``nn.Linear``
    and ``Conv1D`` become layers whose backward makes only what is kept: with ``mask="neuron"`` a gradient of (1 - p)
    times the size, from (1 - p) of the saved input. Every other parameter gets a hook on its gradient.

    The paper's equations and rates are not public. What is known are its words (stochastic masks on gradients in
    backward, for each step, each epoch or each layer) and exact relatives, which are one line each:

    - GradDrop: ``apply_graddrop(model, p=p, mask="weight")`` and a :class:`mixout_kernels.MixSampler`, which draws one
      mask for each optimizer step (without it every backward draws its own). For each epoch: ``every=steps_per_epoch``.
    - Child-Tuning-F (arXiv 2109.05687): the same with p = 1 - its reserve_p, ``exclude=()``.
    - Child-Tuning-D, FISH: ``keep=mk.top_entries(mk.fisher(...))``.
    - Layer-GradDrop, LISA: ``mask="layer"``; a fixed random mask: ``MixSampler(model, every=math.inf)``.

    With mixout in the model, before or after, an entry trains if both keep it: one random word decides twice.

    Args:
        model: the model.
        p: the probability that an entry gets no gradient; or a mapping of patterns to such numbers, of which the first
            that matches a layer or parameter holds, and what matches none is left alone.
        mask: "neuron": one decision for each input feature (for a parameter of one dimension, each entry); "weight":
            for each entry; "output": for each output feature; "layer": for each block, that is each element of an
            outermost ``nn.ModuleList``. A block that is off saves no input and computes no gradients of its linear
            layers in that step, and has no gradients when the optimizer steps, so that nothing moves it; its
            parameters go on requiring grad. It needs a MixSampler. Parameters outside of blocks are always on.
        rescale: False leaves out the factor 1 / (1 - p). Adam does not see it, clipping and SGD do.
        keep: fixed masks in place of p: by parameter name a bool tensor of the parameter's shape, or ``[in]`` for the
            weight of a linear layer. They are not rescaled. Other parameters stay whole.
        include: patterns of layers and parameters; only those that match one are masked.
        exclude: patterns of those to leave alone, new heads by default.

    Returns:
        A :class:`GradDropReport` that lists every parameter.

    Raises:
        ValueError: if nothing matches, if the model has graddrop already, if an argument does not fit, or if the mask
            is not that of a layer's mixout. The model is then unchanged.
        TypeError: for parameters that are sharded: ``fully_shard`` comes after.
    """
    checks.module("apply_graddrop", model)
    checks.kind("apply_graddrop", mask)
    checks.flag("apply_graddrop", "rescale", rescale)
    if gradient_masks_of(model) is not None:
        raise ValueError("apply_graddrop: model: expected one without graddrop; call remove_graddrop(model) first")
    if (p is None) == (keep is None):
        raise ValueError(f"apply_graddrop: p: expected either p or keep, got {'neither' if p is None else 'both'}")
    report, masks = GradDropReport(), GradientMasks()
    if keep is not None:
        _add_fixed(model, keep, masks, report)
        masks.put_in(model)
        return report
    assert p is not None
    matched = _matched(model, Rates("apply_graddrop", p), include, exclude, report)
    blocks = _blocks_of(model, matched, report) if decides_once(mask) else {}
    matched = [one for one in matched if one.name not in report.skipped]
    if not matched:
        reasons = ", ".join(f"{name} ({why})" for name, why in list(report.skipped.items())[:8])
        raise ValueError(
            "apply_graddrop: nothing to mask: expected parameters that require grad and that p, include and exclude "
            f"let through, got {len(report.skipped)}: {reasons}"
        )
    for one in matched:
        _check(one, mask)
    for one in matched:
        block = blocks.get(one.name)
        if block is not None:
            masks.blocks.setdefault(block, Block(one.p)).places.append(one.place)
        if one.layer is not None:
            _mask_layer(one.layer, one.p, mask, rescale, block)
            report.layers[one.layer_name] = f"{type(one.layer).__name__}, p={one.p}, mask={mask!r}"
        else:
            axis = 0 if is_conv1d(one.place.module) else None
            masks.hooks[one.place] = Drawn(block or one.name, one.p, mask, rescale, axis)
            report.hooks[one.name] = f"{type(one.place.module).__name__}, p={one.p}, mask={mask!r}"
    report.blocks = {name: f"p={block.p}, {len(block.places)} parameters" for name, block in masks.blocks.items()}
    masks.put_in(model)
    return report


def remove_graddrop(model: nn.Module) -> None:
    """Takes the masks off the gradients again, in place; mixout stays.

    A :class:`mixout_kernels.MixSampler` of the model is removed too: make another one for the mixout that stays.

    Raises:
        ValueError: if there is no graddrop in the model.
    """
    masks = gradient_masks_of(model)
    if masks is None:
        raise ValueError("remove_graddrop: model: expected one with graddrop, got none")
    layers = [module for module in model.modules() if isinstance(module, MixedLayer)]
    if masks.sampler is not None:
        masks.sampler.remove()
    for layer in layers:
        if layer.is_mixed:
            layer.grad_p, layer.rescale, layer.block, layer.columns = 0.0, True, None, None
        elif layer.has_graddrop:
            to_plain(layer)
    masks.take_out_of(model)


def _matched(
    model: nn.Module, rates: Rates, include: Iterable[str] | None, exclude: Iterable[str], report: GradDropReport
) -> list[_Matched]:
    """Every Parameter of the model that is to be masked; the report gets the others with the reason."""
    included = None if include is None else patterns("apply_graddrop", "include", include)
    excluded = patterns("apply_graddrop", "exclude", exclude)
    matched = []
    owners = _owners(model)
    all_names = [name for places in owners.values() for pair in places for name in pair]
    rates.each_must_apply(all_names)
    each_must_match("apply_graddrop", "include", included or (), all_names, "layer or parameter")
    each_must_match("apply_graddrop", "exclude", own_patterns(excluded), all_names, "layer or parameter")
    for parameter, places in owners.items():
        names = [name for pair in places for name in pair]  # of modules and of the Parameter in them
        (layer_name, name), place = next(iter(places.items()))
        rate = next((rate for rate in map(rates.of, names) if rate is not None), None)
        reason = (
            ("frozen" if not parameter.requires_grad else None)
            or next((f"excluded by {pattern!r}" for pattern in excluded if _any_matches(names, pattern)), None)
            or ("not included" if included is not None and not any(_any_matches(names, i) for i in included) else None)
            or ("no pattern of p matches it" if rate is None else None)
            or ("its p is 0" if rate == 0 else None)
        )
        if reason is not None:
            report.skipped[name] = reason
            continue
        assert rate is not None
        layer = place.module if _computes_alone(model, places) else None
        matched.append(_Matched(name, place, rate, layer, layer_name))
    return matched


def _owners(model: nn.Module) -> dict[nn.Parameter, dict[tuple[str, str], Place]]:
    """By Parameter: the name of each module that holds it and its own name there, and the place."""
    owners: dict[nn.Parameter, dict[tuple[str, str], Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}".lstrip(".")
                owners.setdefault(parameter, {})[prefix, name] = Place(module, attribute)
    return owners


def _any_matches(names: Iterable[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


def _computes_alone(model: nn.Module, places: Mapping[tuple[str, str], Place]) -> bool:
    """Whether the Parameter in these places is the weight of one module, which can make all of its gradient."""
    place = next(iter(places.values()))
    one = all(other.module is place.module for other in places.values())
    return one and place.attribute == "weight" and _computes_its_gradient(model, place.module, places)


def _computes_its_gradient(model: nn.Module, module: nn.Module, places: Mapping[tuple[str, str], Place]) -> bool:
    """Whether the module is, or can become, a layer of this package."""
    if isinstance(module, MixedLayer):
        return True
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return False
    names = [name for name, _ in places]
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in names if name]
    return "" not in names and reason_of_class(module, names, parents, lambda cls: False) is None


def _blocks_of(model: nn.Module, matched: list[_Matched], report: GradDropReport) -> dict[str, str]:
    """The block of each matched Parameter by name; the report gets those outside of blocks."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks: dict[str, str] = {}
    rates: dict[str, float] = {}
    for one in matched:
        outermost = next((name for name in lists if one.name.startswith(f"{name}.")), None)
        if outermost is None:
            report.skipped[one.name] = "outside of every block: always on"
            continue
        block = f"{outermost}.{one.name.removeprefix(f'{outermost}.').partition('.')[0]}"
        if rates.setdefault(block, one.p) != one.p:
            raise ValueError(
                f"apply_graddrop: p: expected one p for each block with mask='layer', got {rates[block]} and {one.p} "
                f"in {block!r}"
            )
        blocks[one.name] = block
    return blocks


def _check(one: _Matched, mask: Mask) -> None:
    parameter, layer = one.place.parameter, one.layer
    if type(parameter) is not nn.Parameter:
        raise TypeError(
            f"apply_graddrop: model: expected plain Parameters, got a {type(parameter).__name__} in {one.name!r}; call "
            "apply_graddrop before the model is sharded or its weights are replaced"
        )
    if isinstance(layer, MixedLayer) and layer.is_mixed and layer.mask != mask:
        raise ValueError(
            f"apply_graddrop: mask: expected {layer.mask!r}, the mask of its mixout, for {one.layer_name!r}, got "
            f"{mask!r}"
        )


def _mask_layer(layer: nn.Module, p: float, mask: Mask, rescale: bool, block: str | None) -> None:
    if isinstance(layer, MixedLayer):
        layer.mask, layer.grad_p, layer.rescale = mask, p, rescale
    else:
        to_mixed(layer, p=0.0, target=None, mask=mask, grad_p=p, rescale=rescale)
    layer.block = block  # type: ignore[assignment]


def _add_fixed(model: nn.Module, keep: Mapping[str, Tensor], masks: GradientMasks, report: GradDropReport) -> None:
    if not isinstance(keep, Mapping) or not keep:
        raise ValueError(f"apply_graddrop: keep: expected masks by the names of parameters, got {keep!r}")
    fixed: dict[str, tuple[nn.Module, Tensor]] = {}  # layers by the name of their weight, and its columns that train
    owners = _owners(model)
    owned = {name: (place, places) for places in owners.values() for (_, name), place in places.items()}
    for name, kept in keep.items():
        if name not in owned:
            raise ValueError(
                f"apply_graddrop: keep: expected names of parameters of the model, got {name!r}; the first of "
                f"{len(owned)} is {next(iter(owned), None)!r}"
            )
        place, places = owned[name]
        broadcast = _broadcast(name, kept, place)
        share = kept.double().mean().item() if kept.numel() else 1.0
        plain = type(place.parameter) is nn.Parameter
        if kept.dim() == 1 and broadcast.dim() == 2 and plain and _computes_alone(model, places):
            fixed[name] = place.module, kept.nonzero().flatten()
            report.layers[name.removesuffix(".weight")] = f"{type(place.module).__name__}, {share:.1%} of columns kept"
        else:
            masks.hooks[place] = Fixed(broadcast)
            report.hooks[name] = f"{type(place.module).__name__}, fixed, {share:.1%} kept"
    for module, columns in fixed.values():  # now that nothing is wrong
        if not isinstance(module, MixedLayer):
            to_mixed(module, p=0.0, target=None)
        module.columns = columns
    report.skipped = {name: "not in keep" for name in owned if name not in keep}


def _broadcast(name: str, kept: Tensor, place: Place) -> Tensor:
    """The mask in a shape that is broadcast to the parameter's."""
    parameter = place.parameter
    assert parameter is not None
    shape, features = list(parameter.shape), None
    if place.attribute == "weight" and parameter.dim() == 2:
        module = place.module
        if isinstance(module, (nn.Linear, MixedLayer)) or is_conv1d(module):
            features = 0 if is_conv1d(module) else 1
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        if list(kept.shape) == shape:
            return kept
        if features is not None and list(kept.shape) == [shape[features]]:
            return kept.unsqueeze(1 - features)
    expected = f"{shape}" if features is None else f"{[shape[features]]} or {shape}"
    found = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
    raise ValueError(f"apply_graddrop: keep: expected a bool tensor {expected} for {name!r}, got {found}")
