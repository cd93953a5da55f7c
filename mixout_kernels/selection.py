"""Which layers of a model are mixed, each with its p, and the reason against every other one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import checks
from .dropout_rates import rates_of
from .evidence import own_patterns
from .modules import MixedLayer, forward_reaches_class, is_conv1d, taken_names
from .patterns import Rates, each_must_match, matches, patterns

Policy = Literal["linear", "after-dropout"]

# Linear layers whose module is seldom or never called, since the class around them reads their weight itself.
READ_ELSEWHERE = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),  # dt_proj everywhere, the others by the kernels for GPUs
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "DetrMHAttentionMap": ("k_linear", "k_proj"),
    "ConditionalDetrMHAttentionMap": ("k_linear", "k_proj"),
    "MaskFormerMHAttentionMap": ("k_linear", "k_proj"),
}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer under each of its names."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_linear(module)}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, MixedLayer)) or is_conv1d(module)


@dataclass
class Selection:
    """Modules to mix, each once, with its names and its p; and the reason against every other linear layer."""

    chosen: list[tuple[nn.Module, list[str], float]]
    skipped: dict[str, str]


def select(
    function: str,
    model: nn.Module,
    *,
    rates: Rates,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
    subclasses: bool | Iterable[type],
    frozen: bool,
    policy: Policy,
    is_new: Callable[[Tensor], str | None],
    example: Any,
) -> Selection:
    """Judges every linear layer of the model by everything that ``apply_mixout`` documents."""
    included = None if include is None else patterns(function, "include", include)
    excluded = () if exclude is None else patterns(function, "exclude", exclude)
    checks.choice(function, "policy", policy, ("linear", "after-dropout"))
    checks.flag(function, "frozen", frozen)
    allowed = _allowed_subclasses(function, subclasses)
    layers = linear_layers(model)
    if layers:
        each_must_match(function, "include", included or (), layers)
        each_must_match(function, "exclude", own_patterns(excluded), layers)
    rates.each_must_apply(layers)

    names_of: dict[int, list[str]] = {}
    for name, module in layers.items():
        names_of.setdefault(id(module), []).append(name)
    selection = Selection([], {})
    for name, module in layers.items():
        names = names_of[id(module)]
        if name != names[0]:
            continue
        parents = [model.get_submodule(other.rpartition(".")[0]) for other in names if other]
        reason = (
            reason_of_class(module, names, parents, allowed)
            or _reason_of_patterns(names, included, excluded)
            or ("no pattern of p matches it" if all(rates.of(other) is None for other in names) else None)
            or _reason_of_policy(parents, policy)
            or (None if frozen or module.weight.requires_grad else "frozen: its weight does not train")
            or is_new(module.get_parameter("weight"))
        )
        if reason is None:
            rate = next(rate for rate in map(rates.of, names) if rate is not None)
            selection.chosen.append((module, names, rate))
        else:
            selection.skipped.update(dict.fromkeys(names, reason))
    if example is not None and selection.chosen:
        called = _called(model, [module for module, _, _ in selection.chosen], example)
        for module, names, _ in selection.chosen:
            if id(module) not in called:
                why = "not reached: the example's forward did not call it; its weight is read elsewhere, or not at all"
                selection.skipped.update(dict.fromkeys(names, why))
        selection.chosen = [entry for entry in selection.chosen if id(entry[0]) in called]
    return selection


def _allowed_subclasses(function: str, subclasses: bool | Iterable[type]) -> Callable[[type], bool]:
    """Whether a subclass of Linear was asked for. Listed classes may have a forward of their own: the user knows it."""
    if isinstance(subclasses, bool):
        return lambda cls: subclasses and cls.forward is nn.Linear.forward  # type: ignore[attr-defined]
    listed = tuple(subclasses) if isinstance(subclasses, Iterable) else (None,)
    if not all(isinstance(cls, type) and issubclass(cls, nn.Linear) for cls in listed):
        raise TypeError(
            f"{function}: subclasses: expected True, False or a list of subclasses of nn.Linear, got {subclasses!r}"
        )
    return lambda cls: cls in listed


def reason_of_class(
    module: nn.Module, names: list[str], parents: list[nn.Module], allowed: Callable[[type], bool]
) -> str | None:
    cls = type(module)
    if isinstance(module, MixedLayer) and module.is_mixed:
        return "mixed already"
    for name, parent in zip(names, parents, strict=False):
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight itself, without its forward"
        for ancestor in type(parent).__mro__:
            if name.rpartition(".")[2] in READ_ELSEWHERE.get(ancestor.__name__, ()):
                return f"{type(parent).__name__} reads its weight itself, without its forward"
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed, not a Parameter"
    if nn.parameter.is_lazy(weight):
        return "lazy: its weight has no shape before the first forward"
    # FSDP's class is the user's Linear all the same, with a sharded weight that apply_mixout refuses.
    sharded = cls.__module__.startswith("torch.distributed.")
    plain = cls is nn.Linear or is_conv1d(module) or isinstance(module, MixedLayer) or sharded
    if not plain and not allowed(cls):
        own = "with a forward of its own" if cls.forward is not nn.Linear.forward else "on request: subclasses=True"
        return f"{cls.__name__} is a subclass of Linear ({own})"
    if not isinstance(module, MixedLayer) and (taken := taken_names(module)):
        return f"{cls.__name__} has attributes of its own that a mixed layer needs: {', '.join(taken)}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if not forward_reaches_class(module):
        return "its forward was replaced on the instance, by one that goes on to the plain layer's"
    return None


def _reason_of_patterns(names: list[str], included: tuple[str, ...] | None, excluded: tuple[str, ...]) -> str | None:
    for pattern in excluded:
        if any(matches(name, pattern) for name in names):
            return f"excluded by {pattern!r}"
    if included is not None and not any(matches(name, pattern) for name in names for pattern in included):
        return "not included"
    return None


def _reason_of_policy(parents: list[nn.Module], policy: Policy) -> str | None:
    if policy == "linear":
        return None
    for parent in parents:
        if any(rates_of(module) for module in (parent, *parent.children())):
            return None
    return "its module has no dropout that mixout could replace (policy='after-dropout')"


def _called(model: nn.Module, modules: list[nn.Module], example: Any) -> set[int]:
    """The ids of those modules that an evaluation of the example calls."""
    called: set[int] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in modules]
    training = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            if isinstance(example, Mapping):
                model(**example)
            elif isinstance(example, (tuple, list)):
                model(*example)
            else:
                model(example)
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    return called
