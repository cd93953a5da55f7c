"""The diagonal of the empirical Fisher information, and what is chosen by it: entries of weights, and layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .example_gradients import ExampleGradients
from .patterns import matches, patterns

Losses = Callable[[nn.Module, Any], Tensor]


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    losses: Losses | None = None,
    per: Literal["example", "batch"] = "example",
    mean: bool = False,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    progress: bool | None = None,
) -> dict[str, Tensor]:
    r"""The diagonal of the empirical Fisher information of every parameter that requires grad.

    .. code-block:: text

        F = mean over examples n of (d loss_n / d w)^2

    with one forward and one backward a batch, whatever its size; autograd makes no gradient of a weight. Equal to the
    loop over single examples, also for padded batches, and for weights that are tied or used several times. (The first
    batch is run backward once more, to see that no module mixes its examples.) The model is in eval mode meanwhile, and
    as before afterwards; no gradients are left behind. With mixout in the model or without, the result is the same.

    Args:
        model: the model itself, not a wrapper (DistributedDataParallel, torch.compile).
        batches: mappings, sequences or tensors; the first dimension of their tensors counts the examples.
        losses: ``losses(model, batch)`` runs the model and returns one loss per example, ``[n]``. None is the cross
            entropy of ``model(**batch).logits`` ``[n, C]`` with ``batch["labels"]`` ``[n]``; anything else has to be
            given (a transformers model's own loss is a mean over the batch, or over its tokens).
        per: "example", or "batch": the square of the gradient of each batch's mean loss (what Child-Tuning-D takes,
            arXiv 2109.05687). ``losses`` may then return one loss ``[]`` for the whole batch.
        mean: return the mean of each tensor, a scalar, in place of the tensor. Most of them are norms, which need less
            time than the tensors and none of their memory. It is what :func:`guided_rates` stands on.
        include, exclude: shell patterns of parameters' names; a pattern matches the whole dotted name or a part of it.
        progress: show a progress bar (by ``rich``). None shows one on a terminal, if rich is installed.

    Under ``torch.distributed`` the ranks' batches are summed, and every rank gets the same result.

    Returns:
        By parameter name: a float32 (or float64) tensor of the parameter's shape, or of no dimension for ``mean``. A
        parameter that has no part in the losses has zeros.

    Raises:
        TypeError: if a batch of several examples reaches a parameter that is not read by the forward of a Linear,
            Conv1D, Embedding, LayerNorm, RMSNorm or a layer with mixout, for each example by itself: raw Parameters,
            convolutions, DeBERTa's and T5's relative positions. Batches of one example serve every model.
        ValueError: for losses that do not fit, or no batches at all.

    Source: Fisher Mask (FISH), arXiv 2111.09839, and guided dropout, arXiv 2406.14005, compute it example by example.
    """
    _check_model(model)
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"fisher: batches: expected an iterable of batches, got one {type(batches).__name__}")
    if per not in ("example", "batch"):
        raise ValueError(f"fisher: per: expected 'example' or 'batch', got {per!r}")
    names = _chosen_parameters(model, include, exclude)
    losses = _cross_entropies if losses is None else losses
    found = ExampleGradients(model, names, norms=mean)
    count = 0
    with _eval_mode(model), torch.enable_grad():
        for batch in _shown(batches, progress):
            examples = _count_examples(batch)
            if per == "batch":
                count += 1
                loss = _checked(losses(model, batch), examples, whole=True).mean()
                found.add_gradients(_gradients(loss, names))
            elif examples == 1:
                count += 1
                found.add_gradients(_gradients(_checked(losses(model, batch), 1).sum(), names))
            else:
                count += examples
                found.add(lambda: _checked(losses(model, batch), examples), examples)  # noqa: B023 (called at once)
    return _mean_over_ranks({name: found.squares[parameter] for parameter, name in names.items()}, count, mean, names)


def top_entries(
    fisher: Mapping[str, Tensor], *, keep: float = 0.3, axis: int | Literal["neuron"] | None = None
) -> dict[str, Tensor]:
    """Masks of the entries with the greatest Fisher information, for ``apply_graddrop(model, keep=...)``.

    The rule of Child-Tuning-D's authors: one threshold for all tensors together, the (1 - keep) quantile of their
    entries with linear interpolation; entries at or above it are kept, so ties are.

    Args:
        fisher: of :func:`fisher`, of the parameters to choose among.
        keep: the part to keep, in [0, 1].
        axis: None decides for each entry. "neuron" decides for each input feature of a weight ``[out, in]``, by the
            mean over its column; a number for each index on that axis (0 for transformers' Conv1D). A tensor of one
            dimension is decided by its entries.

    Returns:
        By name: bool, of the tensor's shape, or ``[size of that axis]``.

    Raises:
        ValueError: for a keep outside [0, 1], no tensors, an axis that one of them does not have, or scalars (of
            ``mean=True``).
    """
    _check_unit("top_entries", "keep", keep)
    if axis is not None and axis != "neuron" and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise ValueError(f"top_entries: axis: expected None, 'neuron' or an int, got {axis!r}")
    if not fisher:
        raise ValueError("top_entries: fisher: expected the Fisher information of one parameter or more, got none")
    ranked: dict[str, Tensor] = {}
    for name, tensor in fisher.items():
        if tensor.dim() == 0:
            raise ValueError(f"top_entries: fisher: expected tensors, got a scalar for {name!r} (mean=True has them)")
        along = 1 if axis == "neuron" else axis
        if along is None or tensor.dim() == 1:
            ranked[name] = tensor
            continue
        if not -tensor.dim() <= along < tensor.dim():
            raise ValueError(f"top_entries: axis: expected one that {name!r} {list(tensor.shape)} has, got {axis}")
        ranked[name] = tensor.movedim(along, 0).flatten(1).mean(1)
    threshold = _quantile(torch.cat([tensor.flatten() for tensor in ranked.values()]), 1 - keep)
    return {name: tensor.double() >= threshold for name, tensor in ranked.items()}


def _quantile(values: Tensor, part: float) -> float:
    """As ``numpy.percentile``. ``torch.quantile`` takes no more than 2^24 values."""
    place = part * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    low, high = (values.kthvalue(min(k, len(values))).values.double().item() for k in (below + 1, below + 2))
    return low + (high - low) * (place - below)


def _check_model(model: nn.Module) -> None:
    checks.module("fisher", model)
    wrapped = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
    if (attribute := wrapped.get(type(model).__name__)) is not None:
        raise TypeError(
            f"fisher: model: expected the model itself, got a {type(model).__name__}: pass model.{attribute}"
        )


def _check_unit(function: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{function}: {argument}: expected a number in [0, 1], got {value!r}")


def _chosen_parameters(
    model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str]
) -> dict[nn.Parameter, str]:
    included = None if include is None else patterns("fisher", "include", include)
    excluded = patterns("fisher", "exclude", exclude)
    names = {
        parameter: name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (included is None or any(matches(name, pattern) for pattern in included))
        and not any(matches(name, pattern) for pattern in excluded)
    }
    if not names:
        raise ValueError(
            "fisher: model: expected parameters that require grad and match include= and not exclude=, got none"
        )
    return names


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _count_examples(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    if isinstance(values, Iterable):
        for value in values:
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
    raise TypeError(f"fisher: batches: expected mappings, sequences or tensors, got a {type(batch).__name__}")


def _cross_entropies(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise TypeError(
            f"fisher: losses: expected them to be given for batches that are no mappings with labels, got a "
            f"{type(batch).__name__}"
        )
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"]
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            "fisher: losses: expected them to be given unless logits are [n, C] and labels [n] class indices, got "
            f"{list(logits.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    return F.cross_entropy(logits, labels, reduction="none")


def _checked(losses: Tensor, examples: int, *, whole: bool = False) -> Tensor:
    shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != [examples] and not (whole and shape == []):
        raise ValueError(f"fisher: losses: expected one loss for each of the {examples} examples, got {shape}")
    if not losses.requires_grad:
        raise ValueError("fisher: losses: expected losses that depend on the parameters, got a tensor without gradient")
    return losses


def _gradients(loss: Tensor, names: Mapping[nn.Parameter, str]) -> dict[nn.Parameter, Tensor]:
    gradients = torch.autograd.grad(loss, list(names), allow_unused=True)
    return {p: gradient for p, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _mean_over_ranks(
    sums: dict[str, Tensor], count: int, mean: bool, parameters: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    total = torch.tensor(count, dtype=torch.int64, device=next(iter(sums.values())).device)
    if dist.is_available() and dist.is_initialized():
        for tensor in (total, *sums.values()):
            dist.all_reduce(tensor)
    if total == 0:
        raise ValueError("fisher: batches: expected one batch or more, got none")
    sizes = {name: parameter.numel() if mean else 1 for parameter, name in parameters.items()}
    return {name: tensor / (total * sizes[name]) for name, tensor in sums.items()}


def _shown(batches: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        if progress is None:
            return batches
        raise ModuleNotFoundError("fisher: progress: expected the package rich; pip install rich") from None
    return track(batches, description="Fisher information", console=Console(stderr=True))
