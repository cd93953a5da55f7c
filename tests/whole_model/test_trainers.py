"""transformers' Trainer and accelerate, without a callback: the masks advance once per optimizer step, exactly."""

import pytest
import torch
from torch import nn

import mixout_kernels as mk

from . import models
from .transformers_models import NO_DROPOUT, SMALL

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


class Watched:
    """Notes the seed of a layer in every training forward."""

    def __init__(self, layer):
        self.layer, self.seeds = layer, []
        layer.register_forward_pre_hook(self.note)

    def note(self, layer, _):
        if layer.training:
            self.seeds.append(int(layer.slot.seed))

    def assert_one_mask_for_each_step(self, steps, micro_batches):
        assert len(self.seeds) == steps * micro_batches
        groups = [self.seeds[i : i + micro_batches] for i in range(0, len(self.seeds), micro_batches)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == steps


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_trainer(tmp_path, accumulation, optimizer):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=50, max_position_embeddings=16)
    model = transformers.BertForSequenceClassification(config)
    mk.apply_mixout(model, p=0.7)
    sampler = mk.MixSampler(model)
    watched = Watched(model.bert.encoder.layer[0].intermediate.dense)
    data = [{"input_ids": torch.randint(1, 50, (6,)), "labels": number % 2} for number in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        optim=optimizer,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    weight = watched.layer.weight.detach().clone()
    result = transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert result.global_step == sampler.step == 4
    watched.assert_one_mask_for_each_step(4, accumulation)
    assert not torch.equal(watched.layer.weight, weight)


@pytest.mark.parametrize("sampler_first", [True, False], ids=["sampler-first", "prepare-first"])
def test_accelerate(sampler_first):
    model = models.with_mixout(models.mlp())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    if sampler_first:
        sampler = mk.MixSampler(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if not sampler_first:
        sampler = mk.MixSampler(wrapped)
    watched = Watched(model[0])
    for _ in range(9):
        with accelerator.accumulate(wrapped):
            loss = wrapped(models.random_input()).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert sampler.step == 3
    watched.assert_one_mask_for_each_step(3, 3)


def test_accelerate_in_bfloat16():
    """Phi is mixed into the dtype of accelerate's autocast."""
    model = models.with_mixout(nn.Sequential(*models.mlp()))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        sampler = mk.MixSampler(model)
        for _ in range(2):
            loss = wrapped(models.random_input()).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert sampler.step == 2
        assert sampler.extra_bytes == 2 * sum(layer.weight.numel() for layer in models.mixed_layers(model).values())
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
