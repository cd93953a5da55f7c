"""Names of modules and parameters, as they are without what wraps a model."""

from __future__ import annotations

from collections.abc import Set

# Modules of torch hold the one that they wrap under these names: torch.compile, FSDP, activation checkpointing.
TORCH_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# And those of DDP and peft, which a model may have as names of its own: they are left out where names are looked up,
# not where masks are made from them, which two layers would then share.
WRAPPERS = TORCH_WRAPPERS | {"module", "base_layer"}


def unwrapped(name: str, wrappers: Set[str] = WRAPPERS) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)
