"""The models that are trained, with their batches. Each has a name, so that another process can make the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, logging

from benchmarks.common import assets

from .variants import Precision

# The report of the missing head, and the bars of loading.
logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    device: str
    rows: int
    tokens: int
    vocabulary: int
    make: Callable[[str], nn.Module]  # of the attention's implementation
    precision: Precision = "float32"  # what is compared by default
    # The sampler's step over the step with dropout that is run alike, at most: by precision, attention and p.
    goals: dict[tuple[str, str, float], float] = field(default_factory=dict)

    def model(self, attention: str = "sdpa") -> nn.Module:
        """Make the model with the same weights every time, in training mode."""
        torch.manual_seed(0)
        return self.make(attention).to(self.device).train()

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, self.vocabulary, (self.rows, self.tokens), generator=generator)
        labels = torch.randint(0, 2, (self.rows,), generator=generator)
        # No attention mask: all sequences are full. transformers reads one on the device before it leaves it out, and
        # cannot while a step is compiled or captured: attention then runs with a mask, past the flash kernel.
        return {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}

    @property
    def description(self) -> str:
        return f"{self.title}, batch {self.rows} x {self.tokens} tokens, fused AdamW"


def _minilm(attention: str) -> nn.Module:
    folder = assets.minilm(assets.cache_folder())
    return AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, num_labels=2, dtype=torch.float32, attn_implementation=attention
    )


def _bert(layers: int, width: int) -> Callable[[str], nn.Module]:
    def make(attention: str) -> nn.Module:
        config = BertConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            problem_type="single_label_classification",  # else the first forward sets it, and the second compiles anew
            attn_implementation=attention,
        )
        return BertForSequenceClassification(config)

    return make


def _goals(**limits: tuple[float, float]) -> dict[tuple[str, str, float], float]:
    """Limits at p = 0.7 and 0.9, by "precision_attention"."""
    return {
        (*name.split("_"), p): limit for name, pair in limits.items() for p, limit in zip((0.7, 0.9), pair, strict=True)
    }


_MINILM = Workload(
    name="minilm",
    title="all-MiniLM-L6-v2 (6 layers, hidden 384)",
    device="cpu",
    rows=16,
    tokens=32,
    vocabulary=30000,
    make=_minilm,
    goals=_goals(float32_sdpa=(0.75, 0.65), bfloat16_sdpa=(0.72, 0.66), bfloat16_eager=(0.70, 0.64)),
)
_TINY = Workload("tiny", "a tiny BERT (2 layers, hidden 128, random weights)", "cpu", 8, 16, 30000, _bert(2, 128))

_BERT_LARGE = Workload(
    name="bert-large",
    title="BERT-large (24 layers, hidden 1024, random weights)",
    device="cuda",
    rows=32,
    tokens=128,
    vocabulary=30000,
    make=_bert(24, 1024),
    precision="bfloat16",
    goals=_goals(bfloat16_sdpa=(0.92, 0.86)),
)

WORKLOADS = {
    workload.name: workload
    for workload in (
        _MINILM,
        replace(_MINILM, name="minilm-8x128", rows=8, tokens=128, goals=_goals(bfloat16_sdpa=(0.72, 0.66))),
        _BERT_LARGE,
        _TINY,
        replace(_TINY, name="tiny-gpu", device="cuda", precision="bfloat16"),
    )
}
DEFAULTS = {"cpu": ("minilm", "minilm-8x128"), "cuda": ("bert-large",)}  # the first, or all of them with --full
QUICK = {"cpu": "tiny", "cuda": "tiny-gpu"}
