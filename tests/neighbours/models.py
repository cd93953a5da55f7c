"""Small models of transformers with random weights, and batches for them: nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {**SMALL, "max_position_embeddings": 16, "num_labels": 2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "num_labels": 2}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
# Options without dropout.
BERT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_OFF = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def bert(**options: object) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER | options))


def roberta(**options: object) -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ENCODER | options))


def deberta(**options: object) -> nn.Module:
    disentangled = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    return transformers.DebertaForSequenceClassification(transformers.DebertaConfig(**ENCODER | disentangled | options))


def albert(**options: object) -> nn.Module:
    config = transformers.AlbertConfig(**ENCODER | {"embedding_size": 8} | options)
    return transformers.AlbertForSequenceClassification(config)


def gpt2(**options: object) -> nn.Module:
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2 | options))


def gpt2_language_model(**options: object) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | options))


def bert_masked_language_model(**options: object) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER | options))


def t5(**options: object) -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes | {"decoder_start_token_id": 0} | options)
    return transformers.T5ForConditionalGeneration(config)


def vit(**options: object) -> nn.Module:
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes | rates | options))


def llama(**options: object) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | options))


def padded_batch(examples: int = 5, positions: int = 7) -> dict[str, Tensor]:
    """Tokens of which some examples have fewer than others, with labels for sentences."""
    generator = torch.Generator().manual_seed(examples)
    tokens = torch.randint(5, 50, (examples, positions), generator=generator)
    mask = torch.ones_like(tokens)
    for example in range(1, examples, 2):
        length = 1 + (2 * example) % positions
        tokens[example, length:], mask[example, length:] = 0, 0
    labels = torch.randint(0, 2, (examples,), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def spread(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in this dtype with weights far from their initial values, where nothing is zero by chance."""
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.1)
    return model


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Those of the loss, by the names of the parameters."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
