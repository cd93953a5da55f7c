"""R3F (Aghajanyan et al., ICLR 2021): the model's answers to a batch and to the same batch, perturbed, are kept alike.

    loss = CE(clean) + weight * [KL(a || b) + KL(b || a)]        a, b: the distributions of the clean and the other pass

Both passes are one forward of a batch twice as long. Without noise this is R-Drop (Liang et al., NeurIPS 2021): the
passes differ by their dropout.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .divergence import symmetric_kl

Noise = Literal["uniform", "normal"]

_IGNORED = -100  # the label that cross entropies in torch and transformers leave out
_APPLIED = "_r3f"  # the attribute of a model in which its handle is


def r3f_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    eps: float = 1e-5,
    weight: float = 1.0,
    noise: Noise | None = "uniform",
    detach: bool = True,
) -> tuple[Tensor, Any]:
    """The loss of R3F for one batch, and the model's outputs: one forward of the batch beside its perturbed copy.

    Args:
        model: of transformers, or one like them: ``model(**inputs)`` returns outputs with ``loss`` and ``logits``.
        inputs: with ``labels``, class indices.
        eps, weight, noise, detach: as in :func:`apply_r3f`.

    Returns:
        The loss, and the outputs for the clean pass, whose ``loss`` it is.

    Raises:
        TypeError: for a regression or multi-label head, whose logits are no distribution.
        ValueError, TypeError: for arguments that do not fit, or if the model has R3F by :func:`apply_r3f` already.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("labels"), Tensor):
        got = f"the keys {list(inputs)}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise TypeError(f"r3f_loss: inputs: expected a mapping with a tensor of labels, got {got}")
    with R3F(model, "r3f_loss", eps, weight, noise, detach, training_only=False):
        if (reason := _no_distribution(model, inputs["labels"])) is not None:
            raise TypeError(
                f"r3f_loss: model: expected a head whose logits are distributions over classes, got {reason}"
            )
        outputs = model(**inputs)
    return (outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]), outputs


def apply_r3f(
    model: nn.Module,
    *,
    eps: float = 1e-5,
    weight: float = 1.0,
    noise: Noise | None = "uniform",
    detach: bool = True,
) -> R3F:
    """Adds R3F's term to the loss of every training forward with labels, in place: for Trainer, accelerate and DDP.

    .. code-block:: text

        loss = CE(clean) + weight * [KL(a || b) + KL(b || a)]    b = f(embeddings + z), z ~ U(-eps, eps) or N(0, eps^2)

    Hooks double every tensor of the batch, give the second half's embeddings the noise and its labels the index that
    cross entropy ignores, and return the clean half's outputs. The mean of the term is over the rows that have a label;
    where the model divides its loss by ``num_items_in_batch``, so is the term.

    At the published eps the noise does next to nothing: with dropout the two passes differ by their dropout, as in
    R-Drop; without it, or under one mixout mask, the term vanishes. See docs/neighbours.md for what was measured, and
    for what to use.

    Args:
        model: of transformers, or one like them: ``model(..., labels=...)`` returns outputs with ``loss`` and
            ``logits``, and ``get_input_embeddings()`` has the module to perturb. Not a wrapper: DDP comes after.
        eps: the size of the noise on the token embeddings, before positions and normalisation.
        weight: lambda, the factor of the term.
        noise: "uniform", "normal", or None: no noise, R-Drop's term (that of the clean pass's cross entropy alone).
        detach: no gradient reaches the embeddings from the noised pass (as in the authors' code for sentences; False as
            for sequences).

    Returns:
        A handle; ``handle.remove()`` ends it, as does leaving a ``with`` block.

    Raises:
        ValueError, TypeError: for arguments that do not fit, or a model that has it already; and in the first training
            forward, for a loss that is no cross entropy of class indices.

    Source: Aghajanyan et al., "Better Fine-Tuning by Reducing Representational Collapse", ICLR 2021, arXiv 2008.03156.
    """
    return R3F(model, "apply_r3f", eps, weight, noise, detach)


class R3F:
    """The handle that :func:`apply_r3f` returns."""

    def __init__(
        self,
        model: nn.Module,
        function: str,
        eps: float,
        weight: float,
        noise: Noise | None,
        detach: bool,
        *,
        training_only: bool = True,
    ) -> None:
        checks.module(function, model)
        for argument, value in (("eps", eps), ("weight", weight)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{function}: {argument}: expected a number >= 0, got {value!r}")
        if noise not in ("uniform", "normal", None):
            raise ValueError(f"{function}: noise: expected 'uniform', 'normal' or None, got {noise!r}")
        if _APPLIED in model.__dict__:
            raise ValueError(
                f"{function}: model: expected one without R3F; call remove() on the handle of the one it has"
            )
        embeddings = None if noise is None else _input_embeddings(model)
        if noise is not None and not isinstance(embeddings, nn.Module):
            raise TypeError(
                f"{function}: model: expected one with get_input_embeddings(), whose output gets the noise, got a "
                f"{type(model).__name__}"
            )
        self.eps, self.weight, self.noise, self.detach = eps, weight, noise, detach
        self._function = function
        self._training_only = training_only
        self._model = model
        self._batch: _Batch | None = None  # the forward that is under way
        self._warned = False
        self._shifted: bool | None = None  # whether row t of the logits predicts label t + 1
        self._divides_by_items: bool | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        if embeddings is not None:
            self._hooks.append(embeddings.register_forward_hook(self._perturb))
        model.__dict__[_APPLIED] = self

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        if self._model.__dict__.get(_APPLIED) is self:
            del self._model.__dict__[_APPLIED]

    def __enter__(self) -> R3F:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        self._batch = None
        if self._training_only and not model.training:
            return None
        named = kwargs | dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
        labels = named.get("labels")
        if labels is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "apply_r3f: a training forward without labels: R3F adds nothing to it. (Trainer keeps the labels "
                    "from the model under label_smoothing_factor and compute_loss_func.)",
                    stacklevel=2,
                )
            return None
        if (reason := _no_distribution(model, labels)) is not None:
            raise ValueError(
                f"{self._function}: labels: expected class indices of a cross entropy, which leaves out those that are "
                f"{_IGNORED}, got {reason}"
            )
        # Made from the labels by the model, but those of the second half are about to go.
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if (
            prepare is not None
            and named.get("decoder_input_ids") is None
            and named.get("decoder_inputs_embeds") is None
        ):
            named["decoder_input_ids"] = prepare(labels=labels)
        self._batch = _Batch(labels, named.get("num_items_in_batch"))
        doubled = {name: _doubled(value, len(labels)) for name, value in named.items()}
        doubled["labels"] = torch.cat([labels, torch.full_like(labels, _IGNORED)])
        if doubled.get("inputs_embeds") is not None and self.noise is not None:
            doubled["inputs_embeds"] = self._perturb(model, (), doubled["inputs_embeds"])
        return (), doubled

    def _perturb(self, _module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        """The second half with the noise, the first time in a forward: a decoder's embeddings stay as they are."""
        if self._batch is None or self._batch.perturbed:
            return embedded
        self._batch.perturbed = True
        clean, other = embedded.chunk(2)
        if self.noise == "uniform":
            z = torch.empty_like(other).uniform_(-self.eps, self.eps)
        else:
            z = torch.randn_like(other) * self.eps
        return torch.cat([clean, (other.detach() if self.detach else other) + z.detach()])

    def _after(self, _model: nn.Module, _args: Any, _kwargs: Any, outputs: Any) -> Any:
        batch, self._batch = self._batch, None
        if batch is None:
            return None
        if self.noise is not None and not batch.perturbed:
            raise ValueError(
                f"{self._function}: model: expected one whose forward calls get_input_embeddings(), got a "
                f"{type(self._model).__name__} that did not"
            )
        named = isinstance(outputs, Mapping)
        loss, logits = (outputs.get("loss"), outputs.get("logits")) if named else tuple(outputs)[:2]
        labels = batch.labels
        if not isinstance(loss, Tensor) or not isinstance(logits, Tensor) or logits.shape[1:-1] != labels.shape[1:]:
            shape = list(logits.shape) if isinstance(logits, Tensor) else None
            raise ValueError(
                f"{self._function}: model: expected outputs with a loss, and logits with one row for each of the "
                f"labels {list(labels.shape)} and of their copies, got logits {shape}"
            )
        loss = loss + self.weight * self._term(loss.detach(), logits, batch)
        halved = {k: _halved(v, len(labels)) for k, v in (outputs.items() if named else enumerate(outputs))}
        halved["loss" if named else 0] = loss
        if not named:
            return tuple(halved.values())
        for name, value in halved.items():
            outputs[name] = value
        return outputs

    def _term(self, loss: Tensor, logits: Tensor, batch: _Batch) -> Tensor:
        a, b = logits.chunk(2)
        labels, items = batch.labels.to(a.device), batch.items
        self._recognise(loss, a.detach(), labels, items)
        if self._shifted is None:  # a batch whose loss is of no row, or no number
            return loss.new_zeros(())
        ignore = (_next(labels) if self._shifted else labels) == _IGNORED
        term = symmetric_kl(a, b, ignore=ignore)
        return term * (~ignore).sum() / items if items is not None and self._divides_by_items else term

    def _recognise(self, loss: Tensor, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> None:
        """Which rows the model's loss is of, and what it divides by: whatever gives the value that it returned.

        Nothing that a model declares says so reliably: BERT accepts num_items_in_batch and ignores it. Of a batch
        without labels every form gives the same, and of a loss that is no number none does: the next batch will tell.
        """
        if self._shifted is not None and (items is None or self._divides_by_items is not None):
            return
        if not (labels != _IGNORED).any():
            return
        errors: dict[tuple[bool, bool | None], float] = {}
        for shifted in (False, True) if labels.dim() > 1 else (False,):
            targets = _next(labels) if shifted else labels
            total = F.cross_entropy(
                logits.flatten(0, -2).float(), targets.flatten(), ignore_index=_IGNORED, reduction="sum"
            )
            rows = (targets != _IGNORED).sum()
            if items is None or rows == 0 or items == rows:  # the divisors give the same, and the question stays open
                errors[shifted, None] = (total / rows.clamp(min=1) - loss).abs().item()
            else:
                errors[shifted, False] = (total / rows - loss).abs().item()
                errors[shifted, True] = (total / items - loss).abs().item()
        if finite := [form for form, error in errors.items() if math.isfinite(error)]:
            self._shifted, self._divides_by_items = min(finite, key=lambda form: errors[form])


class _Batch:
    """One forward: the labels of the clean half, what a loss may be divided by, whether the noise is in."""

    def __init__(self, labels: Tensor, items: Tensor | int | None) -> None:
        self.labels = labels
        self.items = items
        self.perturbed = False


def _input_embeddings(model: Any) -> nn.Module | None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        model = model.get_encoder()  # which need not share its module with the decoder, only its weight
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _no_distribution(model: nn.Module, labels: Tensor) -> str | None:
    """Why the logits are no distributions over classes, or None."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        return f"problem_type={problem!r}"
    if labels.is_floating_point():
        return f"labels of {labels.dtype}: the loss of a regression or of many labels"
    if problem is None and labels.dim() == 1 and getattr(config, "num_labels", None) == 1:
        return "num_labels=1, a regression: the squared error has no distributions"
    return None


def _next(labels: Tensor) -> Tensor:
    """The label of the next position, which a causal language model predicts."""
    return F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]


def _doubled(value: Any, examples: int) -> Any:
    return _mapped(value, examples, lambda t: torch.cat([t, t]))


def _halved(value: Any, examples: int) -> Any:
    return _mapped(value, 2 * examples, lambda t: t[:examples])


def _mapped(value: Any, size: int, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor whose first dimension has this size; in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return function(value) if value.dim() > 0 and value.shape[0] == size else value
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, size, function) for item in value)
    if type(value) is dict:
        return {name: _mapped(item, size, function) for name, item in value.items()}
    return value
