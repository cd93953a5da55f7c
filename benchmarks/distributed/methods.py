"""What is compared, a line each: a way to train the same model on two ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mixout_kernels as mk
from mixout_kernels.modules import MixedLayer

DDP, FSDP = "DDP", "FSDP2"
ENGINES = (DDP, FSDP)


@dataclass(frozen=True)
class Model:
    description: str
    layers: int
    hidden: int
    batch: int
    length: int
    vocabulary: int = 2000

    def make(self) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            intermediate_size=4 * self.hidden,
            num_labels=2,
        )
        return BertForSequenceClassification(config).train()

    def inputs(self, rank: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        tokens = torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator)
        return {"input_ids": tokens, "labels": torch.randint(0, 2, (self.batch,), generator=generator)}


MODELS = {
    "bert": Model("3 layers of BERT-base (hidden 768), batch 8 x 32 a rank", 3, 768, 8, 32),
    "tiny": Model("a BERT of 2 layers (hidden 128), batch 2 x 8 a rank", 2, 128, 2, 8),
}

Step = Callable[[], object]


@dataclass
class Training:
    model: nn.Module
    step: Step

    @property
    def target_bytes(self) -> int:
        """What this rank holds of targets."""
        targets = [module.target for module in self.model.modules() if isinstance(module, MixedLayer)]
        return sum(_local(target).nbytes for target in targets if target is not None)

    def weights(self) -> list[Tensor]:
        return [_local(parameter.detach()) for parameter in self.model.parameters()]


@dataclass(frozen=True)
class Method:
    """One way to train. ``goals``: by link, what its time over that of ``baseline`` is to be at most."""

    engine: str
    name: str
    start: Callable[[nn.Module, Mapping[str, Tensor]], Training]
    baseline: str = "dropout"
    goals: Mapping[str, float] = field(default_factory=dict)
    same_as: str | None = None  # the method that it must have the weights of after the same steps, bit for bit


def _steps(model: nn.Module, call: nn.Module, inputs: Mapping[str, Tensor]) -> Training:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        call(**inputs).loss.backward()
        optimizer.step()

    return Training(model, step)


def _ddp(
    p: float | None, hook: bool = False, communicate: bool = True, bucket_megabytes: float = 25
) -> Callable[..., Training]:
    """25 MB is DDP's own choice. What the hook sends of such a bucket is smaller, so it can do with smaller ones."""

    def start(model: nn.Module, inputs: Mapping[str, Tensor]) -> Training:
        sampler = None
        if p is not None:
            mk.apply_mixout(model, p=p)
            sampler = mk.MixSampler(model, seed=1)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_megabytes)
        if hook:
            ddp.register_comm_hook(mk.KeptColumns(sampler), mk.kept_columns_hook)
        training = _steps(model, ddp, inputs)
        if communicate:
            return training

        def step() -> None:
            with ddp.no_sync():
                training.step()

        return Training(model, step)

    return start


def _fsdp(p: float | None, whole_targets: bool = False, **options: bool) -> Callable[..., Training]:
    def start(model: nn.Module, inputs: Mapping[str, Tensor]) -> Training:
        if p is not None:
            mk.apply_mixout(model, p=p)
        if whole_targets:  # as a sampler that is made before leaves them
            mk.MixSampler(model, seed=1)
        for layer in model.bert.encoder.layer:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model)
        if p is not None and not whole_targets:
            mk.MixSampler(model, seed=1, **options)
        return _steps(model, model, inputs)

    return start


def methods() -> list[Method]:
    """List every method, the one that ratios are taken to first in each engine."""
    whole, small = "mixout, p=0.7, all sent", ", buckets of 8 MB"
    sharded = "mixout, p=0.7, kept reduce-scatter"
    kept = {p: f"mixout, p={p}, kept columns" for p in (0.7, 0.9)}
    gathered = {p: f"mixout, p={p}, and kept all-gather" for p in kept}
    in_small = {p: _ddp(p, hook=True, bucket_megabytes=8) for p in kept}
    return [
        Method(DDP, "dropout", _ddp(None)),
        Method(DDP, whole, _ddp(0.7)),
        Method(DDP, whole + small, _ddp(0.7, bucket_megabytes=8), same_as=whole),
        Method(DDP, kept[0.7], _ddp(0.7, hook=True), whole, {"unlimited": 0.95}, same_as=whole),
        Method(DDP, kept[0.7] + small, in_small[0.7], whole, {"1 Gbit/s": 0.46}, same_as=whole),
        Method(DDP, kept[0.9] + small, in_small[0.9], whole, {"1 Gbit/s": 0.31}),
        Method(DDP, "mixout, p=0.7, no communication", _ddp(0.7, communicate=False)),
        Method(FSDP, "dropout", _fsdp(None)),
        Method(FSDP, "mixout, p=0.7, whole targets", _fsdp(0.7, whole_targets=True)),
        Method(FSDP, sharded, _fsdp(0.7), goals={"1 Gbit/s": 0.80}),
        Method(FSDP, gathered[0.7], _fsdp(0.7, kept_all_gather=True), goals={"1 Gbit/s": 0.45}, same_as=sharded),
        Method(FSDP, gathered[0.9], _fsdp(0.9, kept_all_gather=True), goals={"1 Gbit/s": 0.24}),
    ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
