"""Dropout rates of a model: found wherever a module keeps one, changed by mixout or guided dropout, and restored."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

Owner = Literal["mixout", "guided dropout"]

# Where a module keeps what was changed in it: by attribute, the changes in their order.
_CHANGES = "_dropout_changes"

# dropout, attention_dropout, hidden_dropout_prob, attn_pdrop, drop_rate, drop_prob, dropouts ...; but neither
# dropout_keep_prob, dropout_scale nor layerdrop.
_RATE = re.compile(r"(^|_)p?drop(out)?s?(_?(p|prob|probs|probability|rate|rates|ratio))?\d*$")
# Dropout of whole layers or paths: mixout does not replace it.
_DEPTH = re.compile(r"drop_?path|stochastic_?depth|layer_?drop", re.IGNORECASE)


def rates_of(module: nn.Module) -> dict[str, Any]:
    """The rates above 0 that this module itself keeps: numbers, lists of numbers, and what it reads in its config."""
    if _DEPTH.search(type(module).__name__):
        return {}
    dropout_like = "dropout" in type(module).__name__.lower()
    own = {
        name: value
        for name, value in module.__dict__.items()
        if (_RATE.search(name) or (dropout_like and name == "p")) and _is_rate(value)
    }
    config = module.__dict__.get("config")
    return own | {f"config.{name}": getattr(config, name) for name in _read_from_config(type(module), config)}


def depth_rates_of(module: nn.Module) -> dict[str, float]:
    """Rates of stochastic depth and of LayerDrop, which go on."""
    by_class = bool(_DEPTH.search(type(module).__name__))
    return {
        name: value
        for name, value in module.__dict__.items()
        if (_DEPTH.search(name) or (by_class and (name == "p" or _RATE.search(name))))
        and isinstance(value, float)
        and 0 < value <= 1
    }


class _Change(NamedTuple):
    by: Owner
    before: Any
    given: Any


def change(module: nn.Module, attribute: str, value: Any, by: Owner) -> None:
    """Sets an attribute until :func:`undo`."""
    changes = module.__dict__.setdefault(_CHANGES, {}).setdefault(attribute, [])
    changes.append(_Change(by, module.__dict__[attribute], value))
    setattr(module, attribute, value)


def has_changes(model: nn.Module, by: Owner) -> bool:
    return any(one.by == by for m in model.modules() for made in m.__dict__.get(_CHANGES, {}).values() for one in made)


def undo(model: nn.Module, by: Owner) -> None:
    """Puts back what was there before, in whatever order owners leave; what somebody else has set since stays."""
    for module in model.modules():
        changes = module.__dict__.get(_CHANGES, {})
        for attribute, made in list(changes.items()):
            place = next((place for place, one in enumerate(made) if one.by == by), None)
            if place is None:
                continue
            gone = made.pop(place)
            if place < len(made):  # what was changed upon it goes back to what was before it
                made[place] = made[place]._replace(before=gone.before)
            elif (present := module.__dict__.get(attribute)) is gone.given or present == gone.given:
                setattr(module, attribute, gone.before)
            if not made:
                del changes[attribute]
        if not changes:
            module.__dict__.pop(_CHANGES, None)


def disable(model: nn.Module, mixed: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Sets every rate to 0; says what was set, and what goes on, each by the module's name. ``undo`` ends it.

    The dropouts of an adapter go on unless its layers are among the ``mixed`` ones.
    """
    changed, left = {}, {}
    adapters = _adapter_prefixes(model, tuple(mixed))
    for name, module in model.named_modules():
        if depth := depth_rates_of(module):
            left[name] = f"{_listed(depth)}: stochastic depth, which mixout does not replace"
        rates = rates_of(module)
        if rates and name.startswith(adapters):
            left[name] = f"{_listed(rates)}: of an adapter, whose layers are not mixed"
        elif rates:
            _set_to_zero(module, rates)
            changed[name] = ", ".join(f"{attribute} {rate} -> 0" for attribute, rate in rates.items())
    return changed, left


def _set_to_zero(module: nn.Module, rates: dict[str, Any]) -> None:
    in_config = [name.removeprefix("config.") for name in rates if name.startswith("config.")]
    if in_config:
        change(module, "config", _masked(module.__dict__["config"], tuple(in_config)), "mixout")
    for name, rate in rates.items():
        if not name.startswith("config."):
            change(module, name, _zeros(rate), "mixout")


def _is_rate(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_rate, value)) and all(isinstance(rate, float) and 0 <= rate <= 1 for rate in value)
    return isinstance(value, float) and 0 < value <= 1


def _zeros(rate: Any) -> Any:
    return type(rate)([0.0] * len(rate)) if isinstance(rate, (list, tuple)) else 0.0


def _listed(rates: dict[str, Any]) -> str:
    return ", ".join(f"{attribute} {rate}" for attribute, rate in rates.items())


def _adapter_prefixes(model: nn.Module, mixed: tuple[str, ...]) -> tuple[str, ...]:
    """Of the dropouts that peft's adapters bring along: everything in its layers but the layer that each adapts."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if any(cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            own = [f"{name}.{child}.".lstrip(".") for child in module._modules if child != "base_layer"]
            if not any(layer.startswith(tuple(own)) for layer in mixed):
                prefixes += own
    return tuple(prefixes)


# --- rates that forward reads from a config shared with other modules -------------------------------------------------


def _read_from_config(cls: type[nn.Module], config: Any) -> Iterator[str]:
    """Names of rates above 0 that the class reads from ``self.config`` while it looks at ``self.training``.

    A rate that applies in evaluation too (SpeechT5's prenet) is part of the model, and stays.
    """
    if config is None:
        return
    seen = set()
    for base in cls.__mro__:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if not isinstance(code, types.CodeType) or code.co_name == "__init__":
                continue
            if "config" not in code.co_names or "training" not in code.co_names:
                continue
            for name in code.co_names:
                if name not in seen and _RATE.search(name) and _is_rate(getattr(config, name, None)):
                    seen.add(name)
                    yield name


def _masked(config: Any, rates: tuple[str, ...]) -> Any:
    """The same config, down to its ``__dict__``, but that these rates read as 0."""
    cls = type(config)
    aliases = getattr(config, "attribute_map", {})
    zero = {name: property(lambda _: 0.0) for rate in rates for name in (rate, aliases.get(rate, rate))}
    # A class made here cannot be imported: pickling and copy.deepcopy make it again, around their copy of the config.
    own = {"__reduce_ex__": lambda self, _: (_masked, (config, rates))}
    masked: Any = object.__new__(type(cls.__name__, (cls,), {**zero, **own, "__module__": cls.__module__}))
    object.__setattr__(masked, "__dict__", config.__dict__)
    return masked
