"""The methods as their authors wrote them: masks by eager operations, one example at a time, two forwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixout_kernels as mk


def mask_like_child_tuning_f(model: nn.Module, keep: float) -> None:
    """``g *= Bernoulli(keep) / keep`` for every parameter before the step (AliceMind, ChildTuningOptimizer)."""
    for parameter in model.parameters():
        if (gradient := parameter.grad) is not None:
            gradient *= torch.bernoulli(torch.full_like(gradient, keep)) / keep


def hook_linear_weights(model: nn.Module, p: float) -> None:
    """A hook with a Bernoulli mask on the weight of each linear layer that ``apply_graddrop`` takes."""
    names = mk.apply_graddrop(model, p=p).layers
    mk.remove_graddrop(model)
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        weight.register_hook(lambda g: g * torch.bernoulli(torch.full_like(g, 1 - p)) / (1 - p))


def two_forwards(model: nn.Module, batch: Mapping[str, Tensor], eps: float) -> Tensor:
    """R3F as in fairseq's examples/rxf: a clean and a noised forward, two calls of kl_div on probabilities."""
    clean = model(**batch)
    embeddings = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    noised = embeddings.detach() + torch.empty_like(embeddings).uniform_(-eps, eps)
    logits = model(inputs_embeds=noised).logits
    a, b = F.log_softmax(clean.logits, -1, dtype=torch.float32), F.log_softmax(logits, -1, dtype=torch.float32)
    divergence = F.kl_div(b, a.exp(), reduction="sum") + F.kl_div(a, b.exp(), reduction="sum")
    return clean.loss + divergence / len(logits)


def fisher_by_loop(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One forward and one backward for each example."""
    model.eval()
    examples = len(batch["labels"])
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in range(examples):
        model.zero_grad()
        model(**{name: values[example : example + 1] for name, values in batch.items()}).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.square() / examples
    model.zero_grad()
    model.train()
    return found
