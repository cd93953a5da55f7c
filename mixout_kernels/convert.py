"""Puts mixout into an existing model, and takes it out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, dropout_rates
from .checkpoints import Pretrained, Source
from .draws import Mask
from .evidence import Evidence
from .modules import MixedLayer, frozen_copy, target_keepers, to_mixed, to_plain
from .patterns import Rates
from .report import Report
from .selection import Policy, Selection, is_linear, linear_layers, select


def apply_mixout(
    model: nn.Module,
    *,
    p: float | Mapping[str, float],
    mask: Mask = "neuron",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    subclasses: bool | Iterable[type] = False,
    frozen: bool = False,
    policy: Policy = "linear",
    missing_keys: Iterable[str] | None = None,
    example: Any = None,
    disable_dropout: bool = True,
    targets: Source | None = None,
    target_dtype: torch.dtype | None = None,
) -> Report:
    """Gives the linear layers of a pretrained model mixout, in place, each with its present weight as target.

    Mixed are ``nn.Linear`` and transformers' ``Conv1D``, wherever they are. The modules stay the objects that they are,
    only their class changes; so everything that refers to one of them goes on working: lists, hooks, an optimizer made
    before, ``torch.compile``, checkpoints from before or after. Tied Parameters stay tied and share one target.

    Left alone, and listed with the reason in the report, are layers

    - that are new, so that there is no pretrained weight to mix with. What tells so is, the best that there is:
      ``targets`` has no entry; transformers' ``from_pretrained`` did not load it (it marks what it loads);
      ``missing_keys`` lists it; its name is one of :data:`mixout_kernels.DEFAULT_HEADS` or a known new layer of this
      class of models;
    - that are frozen: a weight equal to its target mixes to itself;
    - that are a subclass of Linear, or whose weight is known to be read without calling them
      (``nn.MultiheadAttention.out_proj``); for those use :func:`mixout_kernels.mixout`.

    Args:
        model: the model, with its pretrained weights loaded.
        p: as in :func:`mixout_kernels.mix_linear`; or a mapping of patterns to such numbers, of which the first that
            matches a layer holds, and layers that match none are left alone.
        mask: as in :func:`mixout_kernels.mix_linear`.
        include: shell patterns; only modules that match one are mixed. A pattern matches the whole dotted name or
            one of its parts: ``"encoder.layer.1?.*"``, ``"query"``.
        exclude: patterns of modules to leave alone. None leaves out new layers. A list says all: nothing else is held
            for new, so that ``()`` mixes new heads with their own initial weight (paper, section 6.2), and
            ``(*mk.DEFAULT_HEADS, "my_head")`` goes by these names alone. With ``targets`` every layer that a list lets
            through needs an entry there; that of a head is in :func:`mixout_kernels.targets_state_dict`.
        subclasses: True mixes subclasses of Linear too that have no forward of their own. A list of classes mixes
            those, with the mixed forward in place of theirs.
        frozen: True mixes weights that do not require grad too, for those that are thawed later.
        policy: "linear", or "after-dropout": only layers whose parent module has a dropout rate above 0, which is what
            the paper's authors did for BERT (its intermediate layers have none).
        missing_keys: names of parameters that were not in the checkpoint, as ``missing_keys`` of what
            ``load_state_dict(strict=False)`` and ``from_pretrained(output_loading_info=True)`` return; a wrapper's
            prefix may be before them.
        example: a batch for the model: a mapping is given as keywords, a tuple or list as positional arguments. The
            model is evaluated on it once, and layers that this does not call are left alone: mixing what is read
            elsewhere does nothing.
        disable_dropout: set the rate of every dropout in the model to 0 (mixout replaces it, paper section 6.1):
            of modules, of float attributes that are named as rates, and of configs that a forward reads. Stochastic
            depth goes on, and so do the dropouts of adapters whose layers are not mixed.
        targets: other targets than the present weights: a state_dict, a model, the path of a checkpoint (a
            .safetensors file, a ``torch.save`` file, or a folder with ``model.safetensors``, ``pytorch_model.bin`` or
            the index of their shards), or the id of a model in the local cache of the Hugging Face hub. Tied weights
            are found under any of their names, and names may differ by a prefix such as ``base_model_prefix``.
        target_dtype: None keeps the targets in their parameter's dtype; ``torch.bfloat16`` halves a float32 model's.

    Returns:
        A :class:`Report` that lists every module with what was done.

    Raises:
        ValueError: if nothing is left to mix, if a pattern matches nothing, if the model has mixout already, if p,
            mask, missing_keys or a target does not fit, or a target is missing where ``exclude`` is a list. The model
            is then unchanged.
        TypeError: for weights that are no plain Parameters: ``fully_shard`` comes after mixout.
        FileNotFoundError: if ``targets`` is a path where there is no checkpoint.
    """
    name = "apply_mixout"
    checks.module(name, model)
    if any(isinstance(module, MixedLayer) and module.is_mixed for module in model.modules()):
        raise ValueError(f"{name}: model: expected one without mixout; call remove_mixout(model) first")
    checks.kind(name, mask)
    rates = Rates(name, p)
    if not isinstance(target_dtype, (torch.dtype, type(None))):
        raise TypeError(f"{name}: target_dtype: expected a torch.dtype or None, got {target_dtype!r}")

    evidence = Evidence(name, model, missing_keys)
    pretrained = None if targets is None else Pretrained(name, targets, model)
    sources: dict[int, Tensor] = {}  # by the weight's id, what is found in targets

    def is_new(weight: Tensor) -> str | None:
        reason = evidence.reason_against(weight)
        if pretrained is None:
            return reason if exclude is None else None
        source = pretrained.find(weight, expected=reason is None or exclude is not None)
        if source is None and exclude is not None:
            raise ValueError(
                f"{name}: targets: expected an entry for {evidence.names_of(weight)[0]!r}, which exclude lets through, "
                f"got none, but {pretrained.summary}: name it in exclude, or give targets that have it, as "
                "targets_state_dict does"
            )
        if source is None:
            return f"new: targets has no entry for it, but {pretrained.summary}"
        sources[id(weight)] = source
        return None

    selection = select(
        name,
        model,
        rates=rates,
        include=include,
        exclude=exclude,
        subclasses=subclasses,
        frozen=frozen,
        policy=policy,
        is_new=is_new,
        example=example,
    )
    if not selection.chosen:
        raise ValueError(_nothing_to_mix(selection))
    _check_graddrop(selection, mask)
    frozen_targets = _frozen_targets(selection, sources, target_dtype, mask)

    report = Report(p, mask, skipped=selection.skipped)
    for module, names, rate in selection.chosen:
        target = frozen_targets[id(module.weight)]
        if isinstance(module, MixedLayer):  # with graddrop, which stays, or of p = 0
            module.mask, module.target, module.p = mask, target, rate
        else:
            to_mixed(module, p=rate, target=target, mask=mask)
        for layer in names:
            report.mixed[layer] = f"{type(module).__name__} {list(module.get_parameter('weight').shape)}, p={rate}"
            report.rates[layer] = rate
    report.target_bytes = sum(target.numel() * target.element_size() for target in frozen_targets.values())
    report.skipped |= _other_parameters(model)
    if disable_dropout:
        report.dropout, report.dropout_left = dropout_rates.disable(model, report.mixed)
        if report.dropout and _attends_by_sdpa_on_cpu(model):
            report.slow[""] = (
                "without dropout torch's sdpa takes its flash kernel, which is slow on a CPU with short sequences in "
                "bfloat16, and in float32 after torch.set_float32_matmul_precision('medium'): load the model with "
                "attn_implementation='eager' there, or train within "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
    return report


def remove_mixout(model: nn.Module) -> None:
    """Makes every mixed layer a plain one again, in place, and restores the dropout rates; trained weights stay.

    A :class:`mixout_kernels.MixSampler` of the model is removed too. A rate that was set since is left as it is. Layers
    with :func:`mixout_kernels.apply_graddrop` keep it, and only that. :func:`mixout_kernels.decay_to_target` goes on.

    Raises:
        ValueError: if there is no mixout in the model.
    """
    checks.module("remove_mixout", model)
    layers = [m for m in model.modules() if isinstance(m, MixedLayer) and (m.is_mixed or not m.has_graddrop)]
    if not layers:
        raise ValueError("remove_mixout: model: expected one with MixLinear or MixConv1D modules, got none")
    for keeper in list(target_keepers):
        keeper.keep_targets(layers)
    for layer in layers:
        layer.__dict__["target"] = None  # no longer needed: a sampler must not bring it back from host memory
    for sampler in {layer.slot.sampler for layer in layers if layer.slot is not None}:
        sampler.remove()
    for layer in layers:
        if layer.has_graddrop:
            layer.p = 0.0
        else:
            to_plain(layer)
    dropout_rates.undo(model, "mixout")


def _attends_by_sdpa_on_cpu(model: nn.Module) -> bool:
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    config = getattr(model, "config", None)  # of transformers
    return on_cpu and getattr(config, "_attn_implementation", None) == "sdpa"


def _check_graddrop(selection: Selection, mask: Mask) -> None:
    for module, names, _ in selection.chosen:
        if isinstance(module, MixedLayer) and module.grad_p and module.mask != mask:
            raise ValueError(
                f"apply_mixout: mask: expected {module.mask!r}, the mask of its graddrop, for {names[0]!r}, got "
                f"{mask!r}"
            )


def _frozen_targets(
    selection: Selection, sources: dict[int, Tensor], dtype: torch.dtype | None, mask: Mask
) -> dict[int, Tensor]:
    """One frozen target for each distinct weight, by the weight's id."""
    targets: dict[int, Tensor] = {}
    for module, names, rate in selection.chosen:
        weight = module.get_parameter("weight")
        if id(weight) in targets:
            continue
        _check_weight(names[0], weight)
        # Copied, and only then cast: .to() of the same dtype would alias the weight or the caller's tensor.
        source = frozen_copy(sources.pop(id(weight), weight))
        # Of a weight without values, on the meta device, a target that was given stays where its values are.
        device = source.device if weight.is_meta else weight.device
        target = source.to(device=device, dtype=dtype or weight.dtype)
        checks.mixout(f"apply_mixout: {names[0]!r}", weight, target.to(weight.device), rate, mask)
        targets[id(weight)] = target
    return targets


def _check_weight(name: str, weight: Tensor) -> None:
    if type(weight) is not nn.Parameter:
        raise TypeError(
            f"apply_mixout: model: expected weights that are Parameters, got a {type(weight).__name__} in {name!r}; "
            "call apply_mixout before the model is sharded or its weights are replaced"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"apply_mixout: model: expected weights of two dimensions, got {list(weight.shape)} in {name!r}: gather "
            "first what is partitioned already (deepspeed.zero.Init)"
        )


def _nothing_to_mix(selection: Selection) -> str:
    skipped = selection.skipped
    layers = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:8])
    message = (
        "apply_mixout: nothing to mix: expected a pretrained Linear or Conv1D that trains and that include and exclude "
        f"let through, got {len(skipped)} linear layers: {layers or 'none'}"
    )
    if any(reason.startswith("frozen") for reason in skipped.values()):
        message += (
            ". Mixing frozen weights changes nothing (frozen=True is for those that are thawed later). A LoRA model "
            "keeps its lora_dropout, or gets mixout on its lora_B: see docs/recipes/peft.md"
        )
    if any("subclass of Linear" in reason for reason in skipped.values()):
        message += ". subclasses= mixes subclasses of Linear"
    return message


def _other_parameters(model: nn.Module) -> dict[str, str]:
    """What no conversion reaches: embeddings, convolutions, ``in_proj_weight``, experts in one tensor, routers."""
    linear_of = {id(module._parameters.get("weight")): name for name, module in linear_layers(model).items()}
    found = {}
    for prefix, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or is_linear(module) or nn.parameter.is_lazy(weight) or weight.dim() < 2:
                continue
            what = f"{type(module).__name__}, a Parameter {list(weight.shape)}"
            tied = linear_of.get(id(weight))
            how = "mixout() mixes it where it is read" if tied is None else f"tied to {tied!r}, and read here as it is"
            found[f"{prefix}.{name}".lstrip(".")] = f"{what}: {how}"
    return found
