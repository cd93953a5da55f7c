"""Where targets come from: the present weight, a checkpoint, a state_dict; in the weight's dtype or bfloat16."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mixout_kernels as mk

from .. import axes
from . import models
from .transformers_models import inputs, make


def as_safetensors(state, folder):
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_torch_file(state, folder):
    torch.save(state, folder / "weights.pt")
    return str(folder / "weights.pt")


def as_folder(state, folder):
    save_file(state, folder / "model.safetensors")
    return folder


def as_state_dict(state, folder):
    return state


SOURCES = [as_safetensors, as_torch_file, as_folder, as_state_dict]


def other_weights(model):
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["weights-dtype", "bfloat16"])
def test_targets_from_elsewhere(tmp_path, source, dtype):
    model, x = models.attention_net(), models.random_input()
    state = other_weights(model)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = mk.apply_mixout(model, p=0.5, targets=source(state, tmp_path), target_dtype=dtype)
    for name in report.mixed:
        target = model.get_submodule(name).target
        assert target.dtype == (dtype or torch.float32)
        assert torch.equal(target, state[f"{name}.weight"].to(target.dtype))
        assert target.data_ptr() != state[f"{name}.weight"].data_ptr()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert report.target_bytes == sum(
        model.get_submodule(name).weight.numel() * (dtype or torch.float32).itemsize for name in report.mixed
    )
    mk.MixSampler(model)
    ours, torchs = models.run(model, x), models.reference_run(model, x)
    assert torch.equal(ours.output, torchs.output)


def test_a_conv1d_model_from_its_checkpoint(tmp_path):
    """GPT-2's own saved weights, [in, out] as they lie there."""
    model = make("gpt2")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    report = mk.apply_mixout(model, p=0.5, targets=tmp_path)
    assert all(torch.equal(model.get_submodule(name).target, saved[f"{name}.weight"]) for name in report.mixed)
    assert model.train()(inputs("gpt2")).isfinite().all()


@axes.masks
@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
def test_bfloat16_targets(mask, premix):
    """Exactly the float32 mix of the rounded target."""
    model, x = models.with_mixout(models.attention_net(), mask=mask, target_dtype=torch.bfloat16), models.random_input()
    mk.MixSampler(model, premix=premix)
    assert all(layer.target.dtype == torch.bfloat16 for layer in models.mixed_layers(model).values())
    ours, torchs = models.run(model, x), models.reference_run(model, x)
    assert torch.equal(ours.output, torchs.output)
    models.assert_in_budget(ours, torchs, models.reference_run(model, x, torch.float64))


def test_a_heads_own_initial_weight():
    """Paper, section 6.2: nothing excluded, and the head's target is what it was initialised with."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    initial = model["classifier"].weight.detach().clone()
    assert "classifier" in mk.apply_mixout(model, p=0.5, exclude=()).mixed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model["classifier"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model["classifier"].target, initial)
    assert not torch.equal(model["classifier"].weight, initial)


def assert_plain(model):
    assert not models.mixed_layers(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in models.attention_net().modules()]


def test_a_missing_checkpoint(tmp_path):
    model = models.attention_net()
    for path, file in [(tmp_path, "model.safetensors"), (tmp_path / "none.pt", "none.pt")]:
        with pytest.raises(FileNotFoundError, match=f"targets: expected a checkpoint, .* {tmp_path / file}"):
            mk.apply_mixout(model, p=0.5, targets=path)
    assert_plain(model)


def test_a_checkpoint_of_another_model():
    model = models.attention_net()
    state = {f"other.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"nothing to mix: .*targets has no entry for it, but 10 others such as 'oth"):
        mk.apply_mixout(model, p=0.5, targets=state)
    assert_plain(model)


def test_a_layer_that_the_checkpoint_has_not():
    """It has no pretrained weight, so it is left out, and the report says so."""
    model = models.attention_net()
    state = {name: value for name, value in model.state_dict().items() if name != "1.key.weight"}
    report = mk.apply_mixout(model, p=0.5, targets=state)
    assert "1.key" not in report.mixed
    assert report.skipped["1.key"].startswith("new: targets has no entry for it")
    assert len(report.mixed) == 4


def test_a_target_of_another_shape():
    model = models.attention_net()
    state = model.state_dict() | {"2.weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"apply_mixout: targets: expected \[8, 48\] for '2.weight', got \[3, 4\]"):
        mk.apply_mixout(model, p=0.5, targets=state)
    assert_plain(model)


def test_a_target_dtype_wider_than_the_weight():
    model = models.attention_net().bfloat16()
    with pytest.raises(TypeError, match=r"target: expected the weight's dtype torch.bfloat16 or a narrower one, got"):
        mk.apply_mixout(model, p=0.5, target_dtype=torch.float32)
    assert_plain(model)


def test_a_checkpoint_that_would_run_code(tmp_path):
    """Loaded with weights_only: a pickle is data."""
    torch.save(models.attention_net(), tmp_path / "model.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        mk.apply_mixout(models.attention_net(), p=0.5, targets=tmp_path / "model.pt")
