"""transformers' architectures, tiny and with random weights; each takes the tensor that ``inputs`` gives."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Output(nn.Module):
    """A model that returns its last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).last_hidden_state


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=50, max_position_embeddings=16)
    return Output(transformers.BertModel(config, add_pooling_layer=False))


def gpt2() -> nn.Module:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0)
    return Output(transformers.GPT2Model(config))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, **NO_DROPOUT, image_size=8, patch_size=4, num_channels=3)
    return Output(transformers.ViTModel(config, add_pooling_layer=False))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=1, max_position_embeddings=16)
    config.use_cache = False
    return Output(transformers.LlamaModel(config))


MODELS = {"bert": bert, "gpt2": gpt2, "vit": vit, "llama": llama}

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# The groups of siblings in each layer, by their attribute names. GPT-2's attention is one Conv1D.
SIBLINGS = {
    "bert": (("query", "key", "value"),),
    "gpt2": (),
    "vit": (_PROJECTIONS,),
    "llama": (_PROJECTIONS, ("gate_proj", "up_proj")),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if name == "vit":
        return torch.randn(2, 3, 8, 8, generator=generator)
    return torch.randint(1, 50, (2, 7), generator=generator)
