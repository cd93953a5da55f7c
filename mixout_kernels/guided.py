"""Guided dropout (arXiv 2406.14005): one rate for each dropout, by the Fisher information of the layer before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from . import checks
from .dropout_rates import change, has_changes, rates_of, undo
from .evidence import DEFAULT_HEADS, own_patterns
from .patterns import each_must_match, matches, patterns
from .selection import linear_layers


@dataclass
class GuidedReport:
    """What :func:`apply_guided_dropout` did; ``str(report)`` as a table."""

    rates: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            *(("guided", name, rate) for name, rate in self.rates.items()),
            *(("skipped", name, why) for name, why in self.skipped.items()),
        ]
        width = max(len(name) for _, name, _ in rows)
        head = f"guided dropout: {len(self.rates)} rates set, {len(self.skipped)} left alone"
        return "\n".join([head, *(f"{what:8} {name:{width}}  {detail}" for what, name, detail in rows)])


def layer_scores(fisher: Mapping[str, Tensor], *layers: str, model: nn.Module | None = None) -> dict[str, float]:
    """A score of each layer: the mean over its tensors of each tensor's mean Fisher information (arXiv 2406.14005).

    Tensors count alike, whatever their sizes.

    Args:
        fisher: of :func:`fisher`, whole or ``mean=True``.
        layers: how the dotted names of layers end: "attention.self" is every attention.self, "layer.*" every block of a
            BERT. A parameter belongs to the shortest such part of its name, by the first pattern that it has. None
            given: every module that holds parameters.
        model: leave out layers without a linear layer of this model, such as norms and embeddings, of which
            ``apply_mixout(p=...)`` would say that they match nothing.

    Returns:
        By pattern, in the order of ``fisher``, those without a dot last: "encoder.layer.0.attention.self.*", or
        "encoder.layer.0.attention.self.query" of a layer that holds its parameters itself, and its score. Rates for
        mixout are those of linear layers::

            mk.apply_mixout(model, p=mk.guided_rates(mk.layer_scores(fisher, model=model)))

    Raises:
        ValueError: if a pattern matches nothing, ``fisher`` is empty, or the model has no linear layer of it.
        TypeError: for a model that is no ``nn.Module``.
    """
    if not isinstance(model, (nn.Module, type(None))):
        raise TypeError(f"layer_scores: model: expected an nn.Module or None, got {type(model).__name__}")
    if not fisher:
        raise ValueError("layer_scores: fisher: expected the Fisher information of one parameter or more, got none")
    means: dict[str, list[float]] = {}
    hold_others: set[str] = set()  # layers with parameters in modules of theirs
    unmatched = set(layers)
    for name, tensor in fisher.items():
        parts = name.split(".")
        holder = name.rpartition(".")[0]
        if not layers:
            means.setdefault(holder, []).append(_mean(tensor))
        for pattern in layers:
            layer = _layer_of(parts, pattern.split("."))
            if layer:
                unmatched.discard(pattern)
                means.setdefault(layer, []).append(_mean(tensor))
                if layer != holder:
                    hold_others.add(layer)
                break
    if unmatched:
        raise ValueError(
            f"layer_scores: layers: expected patterns that match, got {min(unmatched)!r}, which matches none of "
            f"{len(fisher)} parameters, the first of them {next(iter(fisher))!r}"
        )
    scores = {
        f"{layer}.*" if layer in hold_others else layer: sum(values) / len(values)  # "enc.*" would not match enc
        for layer, values in means.items()
    }
    # A pattern without a dot also matches parts of names, and the first that matches a layer has it.
    scores = dict(sorted(scores.items(), key=lambda item: "." not in item[0]))
    if model is None:
        return scores
    taken = {next((pattern for pattern in scores if matches(name, pattern)), None) for name in linear_layers(model)}
    if not taken - {None}:
        raise ValueError(
            "layer_scores: model: expected one with linear layers among the layers of fisher, got a "
            f"{type(model).__name__}, which has none in {', '.join(list(scores)[:8])}"
        )
    return {pattern: score for pattern, score in scores.items() if pattern in taken}


def guided_rates(scores: Mapping[str, float], *, upper: float = 0.1, lower: float = 0.0) -> dict[str, float]:
    """Rates by rank: the lowest score gets ``upper``, the highest ``lower``.

    .. code-block:: text

        p = upper - (upper - lower) * r / (n - 1)        r = 0 .. n - 1, by ascending score

    Scores that are equal keep the order given; one score alone gets ``upper``. The paper's text has upper = 0.1 and
    lower = 0, its code .099 - .00275 r for the 37 dropouts of a BERT-base. The rates also serve mixout, where important
    layers are then mixed less (our analogue, not the paper's)::

        mk.apply_mixout(model, p=mk.guided_rates(mk.layer_scores(fisher, "attention.self"), upper=0.9, lower=0.5))

    Raises:
        ValueError: for a rate outside [0, 1], lower > upper, no scores, or one that is no number.
    """
    for argument, rate in (("upper", upper), ("lower", lower)):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise ValueError(f"guided_rates: {argument}: expected a number in [0, 1], got {rate!r}")
    if lower > upper:
        raise ValueError(f"guided_rates: lower: expected a number <= upper = {upper}, got {lower}")
    if not scores:
        raise ValueError("guided_rates: scores: expected one or more, got none")
    values = {name: float(score) for name, score in scores.items()}
    for name, score in values.items():
        if math.isnan(score):
            raise ValueError(f"guided_rates: scores: expected numbers, got {score} for {name!r}")
    ascending = sorted(values, key=lambda name: values[name])  # stable
    step = (upper - lower) / max(1, len(values) - 1)
    rates = {name: upper - step * rank for rank, name in enumerate(ascending)}
    return {name: rates[name] for name in values}


def apply_guided_dropout(
    model: nn.Module,
    fisher: Mapping[str, Tensor],
    *,
    upper: float = 0.1,
    lower: float = 0.0,
    exclude: Iterable[str] = DEFAULT_HEADS,
) -> GuidedReport:
    """Sets the rate of each dropout of a model by the rank of its layer's Fisher information, in place.

    A dropout's layer is the module that holds it, and its score the mean over that module's tensors of each tensor's
    mean Fisher information: in BERT the embeddings, and attention.self, attention.output and output of each block, as
    in the paper. Everything goes by name. Rates are those of ``nn.Dropout`` modules, and float attributes above 0 that
    are named as rates (their layer is the module that has them). Those in the model itself, or in a module that
    holds another dropout's layer, stay as they are, since their score would be that of several layers: the report lists
    them.

    Args:
        model: the model to fine-tune.
        fisher: of :func:`mixout_kernels.fisher` (``mean=True`` is enough), by the names of this model, or of one with
            the same base model: the paper measures it on the pretraining loss.
        upper, lower: as in :func:`guided_rates`.
        exclude: patterns of dropouts to leave alone, as in :func:`mixout_kernels.apply_mixout`.

    Returns:
        A :class:`GuidedReport` that lists every rate.

    Raises:
        ValueError: if no dropout matches, or the model has guided dropout already. The model is then unchanged.
    """
    checks.module("apply_guided_dropout", model)
    excluded = patterns("apply_guided_dropout", "exclude", exclude)
    if has_changes(model, "guided dropout"):
        raise ValueError(
            "apply_guided_dropout: model: expected one without guided dropout; call remove_guided_dropout(model) first"
        )
    report = GuidedReport()
    places = _places_of_rates(model)
    each_must_match("apply_guided_dropout", "exclude", own_patterns(excluded), [name for name, *_ in places], "dropout")
    layers = {layer for _, _, _, layer in places}
    scores: dict[str, float] = {}
    for name, _, _, layer in places:
        reason = _reason_to_skip(name, layer, layers, excluded)
        score = None if reason else _score(model, layer, fisher)
        if score is None:
            report.skipped[name] = reason or "no Fisher information of its layer's parameters"
        else:
            scores[name] = score
    if not scores:
        raise ValueError(
            "apply_guided_dropout: nothing to guide: expected dropouts in layers whose parameters are in fisher, got "
            f"{', '.join(f'{name} ({why})' for name, why in list(report.skipped.items())[:8]) or 'no dropout at all'}"
        )
    rates = guided_rates(scores, upper=upper, lower=lower)
    for name, module, attribute, _ in places:
        if name in rates:
            before = getattr(module, attribute)
            change(module, attribute, rates[name], "guided dropout")
            report.rates[name] = f"{before:g} -> {rates[name]:.5g} (Fisher {scores[name]:.3g})"
    return report


def remove_guided_dropout(model: nn.Module) -> None:
    """Restores the rates; one that was changed since by someone else stays.

    Raises:
        ValueError: if there is no guided dropout in the model.
    """
    if not has_changes(model, "guided dropout"):
        raise ValueError("remove_guided_dropout: model: expected one with guided dropout, got none")
    undo(model, "guided dropout")


def _places_of_rates(model: nn.Module) -> list[tuple[str, nn.Module, str, str]]:
    """Every rate: its name, the module and the attribute that hold it, and the name of its layer."""
    found: list[tuple[str, nn.Module, str, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found.append((name, module, "p", name.rpartition(".")[0]))
            continue
        for attribute, rate in rates_of(module).items():
            # Above 0: Llama has an attention_dropout of 0, a dropout that it was made without.
            if isinstance(rate, float) and not attribute.startswith("config."):
                found.append((f"{name}.{attribute}".lstrip("."), module, attribute, name))
    return found


def _reason_to_skip(name: str, layer: str, layers: set[str], excluded: tuple[str, ...]) -> str:
    if pattern := next((pattern for pattern in excluded if matches(name, pattern)), None):
        return f"excluded by {pattern!r}"
    if layer == "":
        return "it belongs to the whole model"
    if inner := next((other for other in sorted(layers) if other.startswith(f"{layer}.")), None):
        return f"{layer} also holds {inner}, which has a dropout of its own"
    return ""


def _score(model: nn.Module, layer: str, fisher: Mapping[str, Tensor]) -> float | None:
    """The mean over the layer's tensors of each one's mean; None if ``fisher`` has none of them."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    means = []
    for parameter, _ in model.get_submodule(layer).named_parameters(layer):
        # The Fisher information may be that of the base model, or this may be the base model.
        names = (parameter, parameter.removeprefix(prefix), f"{prefix}{parameter}")
        if found := next((name for name in names if name in fisher), None):
            means.append(_mean(fisher[found]))
    return sum(means) / len(means) if means else None


def _layer_of(parts: Sequence[str], pattern: Sequence[str]) -> str:
    """The shortest beginning of a name that ends as the pattern does, "" for none."""
    for end in range(len(pattern), len(parts)):
        if all(fnmatchcase(part, shape) for part, shape in zip(parts[end - len(pattern) : end], pattern, strict=True)):
            return ".".join(parts[:end])
    return ""


def _mean(tensor: Tensor) -> float:
    return tensor.double().mean().item()
