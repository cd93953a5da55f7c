"""apply_graddrop(keep=...): masks that are given, and never drawn."""

import copy

import pytest
import torch

import mixout_kernels as mk

from .models import BERT_OFF, GPT2_OFF, bert, gpt2, gradients, padded_batch, spread


def test_child_tuning_d_has_a_fixed_mask():
    """Entries outside never move, even with momentum, as long as nothing decays them."""
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch()
    fisher = mk.fisher(model, [batch], per="batch", include=["*.layer.*"])
    keep = mk.top_entries(fisher, keep=0.3)
    kept, total = sum(mask.sum() for mask in keep.values()), sum(mask.numel() for mask in keep.values())
    assert kept / total == pytest.approx(0.3, abs=1e-3)
    plain = gradients(model, batch)
    report = mk.apply_graddrop(model, keep=keep)
    assert set(report.hooks) == set(keep)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for name, gradient in gradients(model, batch).items():
        assert torch.equal(gradient, torch.where(keep[name], plain[name], 0) if name in keep else plain[name])
    for _ in range(3):
        optimizer.step()
        gradients(model, batch)
    for name, parameter in model.named_parameters():
        if name in keep:
            assert torch.equal(parameter[~keep[name]], before[name][~keep[name]])
    mk.remove_graddrop(model)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients(model, batch).items() if "key.bias" not in name)


def test_fixed_columns():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    name = "bert.encoder.layer.0.output.dense.weight"
    columns = torch.arange(32) % 3 == 0
    mk.apply_graddrop(model, keep={name: columns})
    assert torch.equal(gradients(model, batch)[name].any(0), columns)
    model, name = gpt2(**GPT2_OFF).train(), "transformer.h.0.mlp.c_fc.weight"
    mk.apply_graddrop(model, keep={name: torch.arange(16) % 2 == 0})
    assert torch.equal(gradients(model, batch)[name].any(1), torch.arange(16) % 2 == 0)


def test_errors_of_fixed_masks():
    model, name = bert(), "bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(ValueError, match=r"apply_graddrop: keep: expected names of parameters of the model, got 'x'"):
        mk.apply_graddrop(model, keep={"x": torch.ones(2, dtype=torch.bool)})
    expected = r"apply_graddrop: keep: expected a bool tensor \[32\] or \[16, 32\] for 'bert.*', got torch.bool \[16\]"
    with pytest.raises(ValueError, match=expected):
        mk.apply_graddrop(model, keep={name: torch.ones(16, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"expected a bool tensor .* got torch.float32 \[32\]"):
        mk.apply_graddrop(model, keep={name: torch.ones(32)})
    with pytest.raises(ValueError, match=r"apply_graddrop: keep: expected masks by the names of parameters, got \{\}"):
        mk.apply_graddrop(model, keep={})
