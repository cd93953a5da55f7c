"""What tells that a parameter is pretrained: the loader's marks, missing keys, and names at last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn

from .names import unwrapped
from .patterns import matches, strings

# Heads that transformers, timm and peft add to a pretrained model and initialise at random, by name: the last resort
# where nothing tells what is pretrained. (The paper's section 6.2 mixes a new head with its own initial weight: pass
# exclude=() for that.)
DEFAULT_HEADS = (
    "classifier",
    "score",
    "qa_outputs",
    "qa_classifier",
    "pre_classifier",
    "classification_head",
    "logits_proj",
    "sequence_summary",
    "multiple_choice_head",
    "regressor",
    "projector",
    "dist_head",
    "cls_classifier",
    "distillation_classifier",
    "classifier_distill",
    "class_labels_classifier",
    "bbox_predictor",
    "class_embed",
    "bbox_embed",
    "enc_score_head",
    "enc_bbox_head",
    "class_head",
    "box_head",
    "class_predictor",
    "readout_projects",
    "itm_head",
    "tdnn",
    "prompt_encoder",
    "lora_*",
)

# New layers under names that are pretrained in other models: class of the model (a pattern), then names within it.
NEW_IN_CLASS = (
    ("Deberta*ForSequenceClassification", ("pooler",)),
    ("Deberta*ForMultipleChoice", ("pooler",)),
    ("*RobertaForMultipleChoice", ("roberta.pooler",)),
    ("EuroBertFor*Classification", ("dense",)),
    ("ModernBertDecoderForSequenceClassification", ("head",)),
    ("ModernVBertFor*Classification", ("head",)),
    ("GteFor*", ("gte.pooler",)),
    ("NomicBertFor*", ("nomic_bert.pooler",)),
    ("PerceiverFor*", ("perceiver.decoder",)),
    ("SwiftFormerForImageClassification", ("head",)),
    ("HGNetV2ForImageClassification", ("fc",)),
    ("TextNetForImageClassification", ("fc",)),
    ("VJEPA2ForVideoClassification", ("pooler",)),
    ("VideoPrismForVideoClassification", ("head",)),
    ("*ForCTC", ("lm_head",)),
    ("*ForXVector", ("feature_extractor",)),
    ("SegformerForSemanticSegmentation", ("decode_head",)),
    ("PatchTST*For*", ("head",)),
    ("PatchTSMixerFor*", ("head",)),
    ("PrefixEncoder", ("transform",)),
)
# The same for every model of timm, by the module of its class.
NEW_IN_TIMM = ("head", "head.fc", "fc", "head_dist")


def own_patterns(excluded: Iterable[str]) -> list[str]:
    """Those that the user wrote: default heads that this model has not are no typos."""
    return [pattern for pattern in excluded if pattern not in DEFAULT_HEADS]


def names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """By the id of a Parameter: all names that it has in the model, of which tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


class Evidence:
    """What tells that a parameter is pretrained: the loader's marks, missing keys, and names, the best that there is.

    transformers sets ``_is_hf_initialized`` on each Parameter that came from the checkpoint. Only where no Parameter
    of the model has that mark, and no missing keys are given, do names decide.

    Raises:
        TypeError: for missing keys that are no list of names.
        ValueError: for some of which the model has none: they would make everything pretrained.
    """

    def __init__(self, function: str, model: nn.Module, missing_keys: Iterable[str] | None) -> None:
        self._names = names_by_parameter(model)
        self._marked = {
            id(parameter) for parameter in model.parameters() if getattr(parameter, "_is_hf_initialized", False)
        }
        self._missing = None if missing_keys is None else _missing(function, model, missing_keys)
        self._new_names = list(_new_names(model))

    def names_of(self, parameter: Tensor) -> list[str]:
        """All names of a Parameter of the model."""
        return self._names.get(id(parameter), [])

    def reason_against(self, parameter: Tensor) -> str | None:
        """Why this parameter is held for a new one; None for a pretrained one."""
        names = self.names_of(parameter)
        if self._missing is not None and any(unwrapped(name) in self._missing for name in names):
            return "new: missing_keys has it"
        if self._marked:
            return None if id(parameter) in self._marked else "new: from_pretrained did not load it"
        return None if self._missing is not None else self.named_as_new(parameter)

    def named_as_new(self, parameter: Tensor) -> str | None:
        """By its names alone."""
        for name in self.names_of(parameter):
            for prefix, pattern in self._new_names:
                if name.startswith(prefix) and matches(name.removeprefix(prefix), pattern):
                    return f"excluded by {pattern!r}: new, by its name"
        return None


def _missing(function: str, model: nn.Module, missing_keys: Iterable[str]) -> set[str]:
    """The missing keys without what wrappers add to names."""
    keys = strings(function, "missing_keys", missing_keys, "names of parameters")
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    own = [name for name, _ in tensors]
    states = [f"{name}._extra_state".lstrip(".") for name, _ in model.named_modules(remove_duplicate=False)]
    missing = set(map(unwrapped, keys))
    if missing and missing.isdisjoint(map(unwrapped, (*own, *states))):
        raise ValueError(
            f"{function}: missing_keys: expected names of the model's parameters, such as {', '.join(own[:3])}, got "
            f"{', '.join(map(repr, keys[:8]))}, of which it has none"
        )
    return missing


def _new_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of a prefix, and a pattern for what follows it."""
    yield from (("", pattern) for pattern in DEFAULT_HEADS)
    for name, module in model.named_modules():
        prefix, cls = f"{name}." if name else "", type(module)
        for pattern, heads in NEW_IN_CLASS:
            if fnmatchcase(cls.__name__, pattern):
                yield from ((prefix, f"{head}.*") for head in heads)
        if cls.__module__.startswith("timm.models"):
            yield from ((prefix, f"{head}.weight") for head in NEW_IN_TIMM)
            yield from ((prefix, f"{head}.bias") for head in NEW_IN_TIMM)
