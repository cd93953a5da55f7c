"""Every model class of the installed transformers that a small config can be made for, without downloads."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

# Sizes by the name of a config's attribute; what ends alike is alike. Widths are 32, heads 2, layers 2.
SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "dim": 32,
    "hidden_dim": 32,
    "d_embed": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "projection_dim": 32,
    "decoder_hidden_size": 32,
    "encoder_hidden_size": 32,
    "word_embed_proj_dim": 32,
    "true_hidden_size": 32,
    "intra_bottleneck_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_hidden_size": 64,
    "n_inner": 64,
    "d_ff": 64,
    "d_inner": 64,
    "decoder_intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 2,
    "head_dim": 16,
    "d_kv": 16,
    "d_head": 16,
    "attention_head_size": 16,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_queries": 5,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "state_size": 8,
    "num_codebooks": 2,
    "codebook_size": 16,
}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


def small_config(cls: type[Any]) -> Any:
    """The class's default config with every size made small, in the configs that it holds too."""
    defaults = cls()
    options: dict[str, Any] = {}
    for name in inspect.signature(cls.__init__).parameters.keys() | vars(defaults).keys():
        value = getattr(defaults, name, None)
        if isinstance(value, transformers.PretrainedConfig):
            options[name] = small_config(type(value)).to_dict()
        elif name in SIZES and isinstance(value, int) and value > SIZES[name]:
            options[name] = SIZES[name]
        elif name in TOKENS and isinstance(value, int):
            options[name] = min(value, 3)
    return cls(**options)


def classes() -> dict[str, tuple[type[nn.Module], type[Any]]]:
    """Name of each model class, and the class with that of its config."""
    found = {}
    for mapping_name in sorted(vars(modeling_auto)):
        if mapping_name.startswith("MODEL") and mapping_name.endswith("MAPPING"):
            mapping = getattr(modeling_auto, mapping_name)
            for config in list(mapping.keys()):
                with contextlib.suppress(Exception):
                    models = mapping[config]
                    for model in models if isinstance(models, tuple) else (models,):
                        found[model.__name__] = model, config
    return dict(sorted(found.items()))


def full_walk() -> list[str]:
    return list(classes())


def build(name: str) -> nn.Module:
    """A small model of this class with every dropout rate at 0.1; what cannot be made small raises."""
    cls = getattr(transformers, name, None) or classes()[name][0]
    config = small_config(cls.config_class)
    raise_rates(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > 2e7:
        raise ValueError(f"{name} stays large: {size} parameters")
    torch.manual_seed(0)
    return cls(config)


def raise_rates(config: Any) -> None:
    """Every dropout rate to 0.1, every other noise of training to none."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            raise_rates(value)
        elif name == "apply_spec_augment":
            config.apply_spec_augment = False
        elif "jitter_noise" in name or (("layerdrop" in name or "path" in name) and isinstance(value, float)):
            setattr(config, name, 0.0)
        elif "drop" in name and "keep" not in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.1)


def inputs(model: Any) -> dict[str, Any]:
    """A small batch by the names that the forward has."""
    generator = torch.Generator().manual_seed(0)
    name, accepted = model.main_input_name, inspect.signature(model.forward).parameters
    if name == "pixel_values":
        batch = {name: torch.randn(2, 3, 32, 32, generator=generator)}
    elif name == "input_values":
        batch = {name: torch.randn(2, 2000, generator=generator)}
    elif name == "input_features":
        bins, frames = getattr(model.config, "num_mel_bins", 80), 2 * getattr(model.config, "max_source_positions", 32)
        batch = {name: torch.randn(2, bins, frames, generator=generator)}
    else:
        batch = {name: torch.randint(4, 90, (2, 7), generator=generator)}
        if "MultipleChoice" in name_of(model):
            batch[name] = batch[name][:, None].repeat(1, 2, 1)
        # Without images where text alone will do: generating models want them at places of their own.
        if "pixel_values" in accepted and not name_of(model).endswith("ForConditionalGeneration"):
            batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    if "decoder_input_ids" in accepted and name != "decoder_input_ids":
        batch["decoder_input_ids"] = torch.randint(4, 90, (2, 5), generator=generator)
    return batch | ({"use_cache": False} if "use_cache" in accepted else {})


def name_of(model: nn.Module) -> str:
    return type(model).__name__


def tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """All tensors of a model's output."""
    if isinstance(outputs, torch.Tensor):
        yield torch.nan_to_num(outputs)
    elif isinstance(outputs, dict):
        yield from (tensor for value in outputs.values() for tensor in tensors(value))
    elif isinstance(outputs, (tuple, list)):
        yield from (tensor for value in outputs for tensor in tensors(value))
