"""Mixout (Lee, Cho & Kang, ICLR 2020) at a negative price: fused kernels and a drop-in ``torch.nn.Linear``."""

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from .backends import kernels
from .convert import apply_mixout, remove_mixout
from .decay import decay_to_target
from .divergence import symmetric_kl
from .evidence import DEFAULT_HEADS
from .fisher import fisher, top_entries
from .functional import keep_mask, mix_linear, mixout
from .graddrop import GradDropReport, apply_graddrop, remove_graddrop
from .guided import GuidedReport, apply_guided_dropout, guided_rates, layer_scores, remove_guided_dropout
from .learning_rate import learning_rate_factor
from .modules import MixConv1D, MixLinear
from .r3f import apply_r3f, r3f_loss
from .report import Report
from .sampler import MixSampler
from .targets import targets_state_dict, track_targets

if TYPE_CHECKING:
    from .distributed import KeptColumns as KeptColumns
    from .distributed import kept_columns_hook as kept_columns_hook
    from .distributed import shard_targets as shard_targets
    from .integrations import MixSamplerCallback as MixSamplerCallback

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_HEADS",
    "GradDropReport",
    "GuidedReport",
    "MixConv1D",
    "MixLinear",
    "MixSampler",
    "Report",
    "apply_graddrop",
    "apply_guided_dropout",
    "apply_mixout",
    "apply_r3f",
    "decay_to_target",
    "fisher",
    "guided_rates",
    "keep_mask",
    "kernels",
    "layer_scores",
    "learning_rate_factor",
    "mix_linear",
    "mixout",
    "r3f_loss",
    "reference",
    "remove_graddrop",
    "remove_guided_dropout",
    "remove_mixout",
    "symmetric_kl",
    "targets_state_dict",
    "top_entries",
    "track_targets",
]


# Imported on first use, and not in __all__: they need transformers, or a torch that was built with torch.distributed.
_ON_DEMAND = {
    "KeptColumns": "distributed",
    "MixSamplerCallback": "integrations",
    "kept_columns_hook": "distributed",
    "shard_targets": "distributed",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(f".{_ON_DEMAND[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
