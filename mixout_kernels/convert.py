"""Puts mixout into an existing model, and takes it out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checks
from .functional import Mask
from .modules import MixConv1D, MixLinear, frozen_copy, to_plain

# Heads that transformers adds to a pretrained model and initialises at random: there is no pretrained weight to mix
# with. (The paper's section 6.2 mixes a new head with its own initial weight: pass exclude=() for that.)
DEFAULT_HEADS = (
    "classifier",
    "score",
    "qa_outputs",
    "pre_classifier",
    "classification_head",
    "logits_proj",
    "sequence_summary",
    "multiple_choice_head",
    "regressor",
    "projector",
    "lora_*",
)

# The attribute in which DistributedDataParallel looks for names to leave alone.
_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"

# Where the dropout rates of a module are kept while mixout is in the model.
_RATES_ATTRIBUTE = "_dropout_before_mixout"


@dataclass
class Report:
    """What :func:`apply_mixout` did: one line per module, and ``str(report)`` as a table."""

    p: float
    mask: str
    mixed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dropout: dict[str, str] = field(default_factory=dict)
    target_bytes: int = 0

    def __str__(self) -> str:
        rows = [
            *(("mixed", name, what) for name, what in self.mixed.items()),
            *(("skipped", name, why) for name, why in self.skipped.items()),
            *(("dropout", name, rates) for name, rates in self.dropout.items()),
        ]
        width = max(len(name) for _, name, _ in rows)
        lines = [f"{what:8} {name or '(the model)':{width}}  {detail}" for what, name, detail in rows]
        return "\n".join(
            [
                f"mixout p={self.p}, mask={self.mask!r}: {len(self.mixed)} mixed, {len(self.skipped)} skipped, "
                f"{len(self.dropout)} dropout rates set to 0, {self.target_bytes / 2**20:.1f} MiB of frozen targets",
                *lines,
            ]
        )


def apply_mixout(
    model: nn.Module,
    *,
    p: float,
    mask: Mask = "neuron",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = DEFAULT_HEADS,
    disable_dropout: bool = True,
    targets: Mapping[str, Tensor] | str | Path | None = None,
    target_dtype: torch.dtype | None = None,
) -> Report:
    """Swaps the linear layers of a pretrained model for mixout ones, in place, each with its present weight as target.

    Swapped are ``nn.Linear`` and transformers' ``Conv1D``, wherever they are; Parameters, hooks and names stay, so an
    optimizer made before, and checkpoints from before or after, still fit. Tied Parameters stay tied and share one
    target. Subclasses of Linear are left alone, since something else may read their weight (``nn.MultiheadAttention``
    does); for those use :func:`mixout_kernels.mixout`.

    Args:
        model: the model, with its pretrained weights loaded.
        p, mask: as in :func:`mixout_kernels.mix_linear`.
        include: shell patterns; only modules that match one are swapped. A pattern matches the whole dotted name or
            one of its parts: ``"encoder.layer.1?.*"``, ``"query"``.
        exclude: patterns of modules to leave alone, by default heads and adapters that are not pretrained, by the names
            that transformers and peft give them: look at the report for others.
        disable_dropout: set the rate of every dropout in the model to 0 (mixout replaces it, paper section 6.1):
            ``nn.Dropout`` modules, and float attributes of modules whose name contains "dropout".
        targets: other targets than the present weights: a state_dict, or the path of a checkpoint (a .safetensors file,
            a ``torch.save`` file, or a folder with ``model.safetensors``), with the names of this model or, as
            transformers saves a model without its head, without its ``base_model_prefix``.
        target_dtype: None keeps the targets in their parameter's dtype; ``torch.bfloat16`` halves a float32 model's.

    Returns:
        A :class:`Report` that lists every module with what was done.

    Raises:
        ValueError: if nothing matches, if the model has mixout already, or if p, mask or a target does not fit. The
            model is then unchanged.
        TypeError: for weights that are no plain Parameters: ``fully_shard`` comes after mixout.
        FileNotFoundError: if ``targets`` is a path where there is no checkpoint.
    """
    _check_model("apply_mixout", model, "use MixLinear.from_linear for a layer by itself")
    places = list(_places(model))
    if any(isinstance(module, (MixLinear, MixConv1D)) for _, _, _, module in places):
        raise ValueError("apply_mixout: model: expected one without mixout; call remove_mixout(model) first")
    included = None if include is None else patterns("apply_mixout", "include", include)
    excluded = patterns("apply_mixout", "exclude", exclude)
    if not isinstance(targets, (Mapping, str, Path, type(None))):
        raise TypeError(f"apply_mixout: targets: expected a state_dict or a path, got {type(targets).__name__}")
    if not isinstance(target_dtype, (torch.dtype, type(None))):
        raise TypeError(f"apply_mixout: target_dtype: expected a torch.dtype or None, got {target_dtype!r}")

    report = Report(p, mask, skipped=_raw_parameters(model))
    matched: list[tuple[str, nn.Module, str, nn.Module]] = []
    for name, parent, attribute, module in places:
        reason = _reason_to_skip(name, module, included, excluded)
        if reason is None:
            matched.append((name, parent, attribute, module))
        elif reason:
            report.skipped[name] = reason
    if not matched:
        linears = [name for name, _, _, module in places if _is_linear(module)]
        raise ValueError(
            f"apply_mixout: nothing to mix: expected a Linear or Conv1D that matches include={include!r} and not "
            f"exclude={exclude!r}, got {len(linears)} linear layers: {', '.join(linears[:8]) or 'none'}"
        )

    base_prefix = f"{getattr(model, 'base_model_prefix', '')}."
    frozen = _frozen_targets(matched, targets, target_dtype, p, mask, base_prefix)
    replacements: dict[int, nn.Module] = {}
    for name, parent, attribute, module in matched:
        if id(module) not in replacements:
            target = frozen[id(module.get_parameter("weight"))]
            if isinstance(module, nn.Linear):
                replacements[id(module)] = MixLinear.from_linear(module, p=p, target=target, mask=mask)
            else:
                replacements[id(module)] = MixConv1D.from_conv1d(module, p=p, target=target, mask=mask)
        setattr(parent, attribute, replacements[id(module)])
        report.mixed[name] = f"{type(replacements[id(module)]).__name__} {list(module.get_parameter('weight').shape)}"
    report.target_bytes = sum(target.numel() * target.element_size() for target in frozen.values())
    _keep_targets_out_of_ddp(model)
    if disable_dropout:
        report.dropout = _disable_dropout(model)
    return report


def _keep_targets_out_of_ddp(model: nn.Module) -> None:
    """DistributedDataParallel broadcasts every buffer in every forward; the targets are equal on all ranks already."""
    names = _ddp_names(name for name, module in model.named_modules() if isinstance(module, (MixLinear, MixConv1D)))
    ignored = set(getattr(model, _DDP_IGNORED, ()))
    setattr(model, _DDP_IGNORED, [*(ignored - names), *sorted(names)])


def _ddp_names(layers: Iterable[str]) -> set[str]:
    """Of their targets, in the model and in torch.compile(model), which DDP may be given."""
    return {f"{prefix}{name}.target" for name in layers for prefix in ("", "_orig_mod.")}


def _frozen_targets(
    matched: list[tuple[str, nn.Module, str, nn.Module]],
    source: Mapping[str, Tensor] | str | Path | None,
    dtype: torch.dtype | None,
    p: float,
    mask: Mask,
    base_prefix: str,
) -> dict[int, Tensor]:
    """One frozen target for each distinct weight, by the weight's id."""
    state = _read_checkpoint(Path(source)) if isinstance(source, (str, Path)) else source
    frozen: dict[int, Tensor] = {}
    for name, _, _, module in matched:
        weight = module.get_parameter("weight")
        if id(weight) in frozen:
            continue
        _check_weight(name, weight)
        key = f"{name}.weight"
        if state is not None and key not in state:
            base_key = key.removeprefix(base_prefix)
            if base_key not in state:
                raise ValueError(
                    f"apply_mixout: targets: expected an entry {key!r}, got {len(state)} others, the first of them "
                    f"{next(iter(state), None)!r}"
                )
            key = base_key
        origin = weight if state is None else state[key]
        if not isinstance(origin, Tensor):
            raise TypeError(f"apply_mixout: targets: expected a tensor for {key!r}, got {type(origin).__name__}")
        # Copied, and only then cast: .to() of the same dtype would alias the weight or the caller's tensor.
        target = frozen_copy(origin).to(device=weight.device, dtype=dtype or weight.dtype)
        checks.mixout("apply_mixout", weight, target, p, mask)
        frozen[id(weight)] = target
    return frozen


def _check_weight(name: str, weight: Tensor) -> None:
    if type(weight) is not nn.Parameter:
        raise TypeError(
            f"apply_mixout: model: expected weights that are Parameters, got a {type(weight).__name__} in {name!r}; "
            "call apply_mixout before the model is sharded or its weights are replaced"
        )
    if weight.is_meta:
        raise ValueError(
            f"apply_mixout: model: expected its pretrained weights, got {name!r} on the meta device, without data; "
            "load them first"
        )


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"apply_mixout: targets: expected a checkpoint, got no file at {file}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def remove_mixout(model: nn.Module) -> None:
    """Puts the plain modules back, in place, and restores the dropout rates; trained weights stay as they are.

    A :class:`mixout_kernels.MixSampler` of the model is removed too.

    Raises:
        ValueError: if there is no mixout in the model.
    """
    _check_model("remove_mixout", model, "it has no place to put a plain layer into")
    matched = [
        (name, parent, attribute, module)
        for name, parent, attribute, module in _places(model)
        if isinstance(module, (MixLinear, MixConv1D))
    ]
    if not matched:
        raise ValueError("remove_mixout: model: expected one with MixLinear or MixConv1D modules, got none")
    for _, _, _, mixed in matched:
        mixed.target = None  # no longer needed: a sampler must not bring it back from host memory
    for sampler in {module.slot.sampler for _, _, _, module in matched if module.slot is not None}:
        sampler.remove()
    plain: dict[int, nn.Module] = {}
    for _, parent, attribute, mixed in matched:
        if id(mixed) not in plain:
            plain[id(mixed)] = to_plain(mixed)
        setattr(parent, attribute, plain[id(mixed)])
    gone = _ddp_names(name for name, _, _, _ in matched)
    ignored = [name for name in getattr(model, _DDP_IGNORED, ()) if name not in gone]
    if ignored:
        setattr(model, _DDP_IGNORED, ignored)
    else:
        model.__dict__.pop(_DDP_IGNORED, None)
    for module in model.modules():
        for attribute, rate in module.__dict__.pop(_RATES_ATTRIBUTE, {}).items():
            setattr(module, attribute, rate)


def _check_model(function: str, model: nn.Module, remedy: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model: expected an nn.Module, got {type(model).__name__}")
    if _is_linear(model) or isinstance(model, MixConv1D):
        raise ValueError(f"{function}: model: expected one with layers in it, got a {type(model).__name__}: {remedy}")


def _raw_parameters(model: nn.Module) -> dict[str, str]:
    """Weights that no swap reaches: ``in_proj_weight``, XLNet's q, k and v, experts in one tensor, positions."""
    why = "a Parameter {} of its own: mixout() mixes it where it is read"
    return {
        f"{prefix}.{name}".lstrip("."): why.format(list(weight.shape))
        for prefix, module in model.named_modules()
        if not _is_linear(module)
        for name, weight in module._parameters.items()
        if weight is not None and weight.dim() > 1 and name != "weight"
    }


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every (name, parent, attribute, module); a module that is registered in several places comes once for each."""
    seen: set[tuple[int, str]] = set()
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, module in parent._modules.items():  # named_children() drops a second name of the same module
            if module is not None and (id(parent), attribute) not in seen:
                seen.add((id(parent), attribute))
                yield f"{prefix}.{attribute}".lstrip("."), parent, attribute, module


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _reason_to_skip(
    name: str, module: nn.Module, included: tuple[str, ...] | None, excluded: tuple[str, ...]
) -> str | None:
    """None for a module to swap, a reason for a linear layer that is left alone, "" for everything else."""
    if not _is_linear(module):
        return ""
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"{type(module).__name__} is a subclass of Linear: its weight may be read without its forward"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not a Parameter"
    if pattern := next((pattern for pattern in excluded if matches(name, pattern)), None):
        return f"excluded by {pattern!r}"
    if included is not None and not any(matches(name, pattern) for pattern in included):
        return "not included"
    return None


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or any(fnmatchcase(part, pattern) for part in name.split("."))


def patterns(function: str, argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"{function}: {argument}: expected a list of patterns, got the string {patterns!r}")
    found = tuple(patterns) if isinstance(patterns, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{function}: {argument}: expected a list of patterns, got {patterns!r}")
    return found


def _disable_dropout(model: nn.Module) -> dict[str, str]:
    changed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates = {"p": module.p}
        else:
            rates = {
                attribute: value
                for attribute, value in module.__dict__.items()
                if "dropout" in attribute and isinstance(value, float)
            }
        rates = {attribute: rate for attribute, rate in rates.items() if rate > 0}
        if rates:
            module.__dict__[_RATES_ATTRIBUTE] = rates
            for attribute in rates:
                setattr(module, attribute, 0.0)
            changed[name] = ", ".join(f"{attribute} {rate} -> 0" for attribute, rate in rates.items())
    return changed
