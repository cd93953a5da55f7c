"""What is trained: a model, its batch, and the precision. Each by name, so that another process can make the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.finetune import assets
from benchmarks.finetune.model import Checkpoint


@dataclass(frozen=True)
class Workload:
    title: str
    device: str
    rows: int
    tokens: int
    vocabulary: int
    make: Callable[[], nn.Module]
    goals: dict[float, float]  # p: the sampler's step over the step with dropout, at most
    low: torch.dtype | None = None  # of autocast

    def model(self) -> nn.Module:
        """The same weights every time, in training mode."""
        torch.manual_seed(0)
        return self.make().to(self.device).train()

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, self.vocabulary, (self.rows, self.tokens), generator=generator)
        labels = torch.randint(0, 2, (self.rows,), generator=generator)
        # No attention mask: all sequences are full. transformers reads one on the device before it leaves it out, and
        # cannot while a step is compiled or captured: attention then runs with a mask, past the flash kernel.
        return {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, self.low or torch.bfloat16, enabled=self.low is not None)

    @property
    def description(self) -> str:
        precision = "float32" if self.low is None else f"{str(self.low).removeprefix('torch.')} autocast"
        return f"{self.title}, batch {self.rows} x {self.tokens} tokens, {precision}, fused AdamW"


def _minilm() -> nn.Module:
    return Checkpoint(assets.minilm(assets.cache_folder()), max_length=32).load(num_labels=2)


def _bert(layers: int, width: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = BertConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            problem_type="single_label_classification",  # else the first forward sets it, and the second compiles anew
        )
        return BertForSequenceClassification(config)

    return make


_TINY = Workload("a tiny BERT (2 layers, hidden 128, random weights)", "cpu", 8, 16, 30000, _bert(2, 128), goals={})

WORKLOADS = {
    "minilm": Workload(
        "all-MiniLM-L6-v2 (6 layers, hidden 384)", "cpu", 16, 32, 30000, _minilm, goals={0.7: 0.75, 0.9: 0.65}
    ),
    "bert-large": Workload(
        "BERT-large (24 layers, hidden 1024, random weights)",
        "cuda",
        32,
        128,
        30000,
        _bert(24, 1024),
        goals={0.7: 0.92, 0.9: 0.86},
        low=torch.bfloat16,
    ),
    "tiny": _TINY,
    "tiny-gpu": replace(_TINY, device="cuda", low=torch.bfloat16),
}
