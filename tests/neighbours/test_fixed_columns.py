"""Layers of which fixed columns of the weight train make the gradient of these columns alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixout_kernels as mk
from mixout_kernels.modules import MixedLayer

KEEP = torch.tensor([True, False, False, True, True, False])


def _models() -> tuple[nn.Linear, nn.Sequential]:
    """A layer, and a model with the same layer: a model that is one layer keeps its class, and has a hook."""
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    return plain, nn.Sequential(copy.deepcopy(plain))


def _gradients(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(g)
    found = {name.removeprefix("0."): parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **found}  # type: ignore[dict-item]


def _whole(plain: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    expected = _gradients(plain, x, g)
    return expected | {"weight": torch.where(KEEP, expected["weight"], 0)}


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_is_that_of_the_kept_columns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, model = (module.to(dtype) for module in _models())
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    torch.manual_seed(1)
    x, g = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 4, dtype=dtype)
    found, expected = _gradients(model, x, g), _whole(plain, x, g)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def _saved_shapes(module: nn.Module, x: Tensor) -> list[list[int]]:
    saved: list[list[int]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(list(t.shape)), lambda _: None):
        module(x)
    return saved


def test_what_is_saved_is_the_kept_input() -> None:
    _, model = _models()
    x = torch.randn(5, 6, requires_grad=True)
    assert [5, 6] in _saved_shapes(model, x)
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    assert [5, 6] not in _saved_shapes(model, x)
    assert [5, 3] in _saved_shapes(model, x)


def test_evaluation_saves_nothing_less_and_masks_nothing() -> None:
    plain, model = _models()
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    model.eval()
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = _gradients(plain, x, g)
    for name, value in _gradients(model, x, g).items():
        assert torch.equal(value, expected[name]), name


def test_autocast_gives_a_float32_gradient() -> None:
    plain, model = _models()
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    x, g = torch.randn(5, 6), torch.randn(5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = _gradients(model, x, g), _whole(plain, x, g)
    assert found["y"].dtype == torch.bfloat16
    assert found["weight"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=2**-6, atol=2**-6, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_that_does_not_fit_is_said(autocast: bool) -> None:
    _, model = _models()
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        message = r"input: expected \[..., 6\] for a weight \[4, 6\], got \[5, 7\]"
        with pytest.raises(ValueError, match=message):
            model(torch.randn(5, 7))
        for dtype in () if autocast else (torch.float16, torch.float64):
            with pytest.raises(TypeError, match=f"input: expected the weight's dtype torch.float32, got {dtype}"):
                model(torch.randn(5, 6, dtype=dtype))


@pytest.mark.parametrize("first", ["mixout", "graddrop"])
def test_mixout_of_the_same_layer_is_masked_further(first: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    keep = {"0.weight": KEEP}
    if first == "mixout":
        mk.apply_mixout(model, p=0.5, exclude=())
        mk.apply_graddrop(model, keep=keep)
    else:
        mk.apply_graddrop(model, keep=keep)
        mk.apply_mixout(model, p=0.5, exclude=())
    layer = model[0]
    assert isinstance(layer, MixedLayer)
    sampler = mk.MixSampler(model, seed=3)
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    y = F.linear(x, mk.mixout(layer.weight, layer.target, p=0.5, seed=layer.slot.seed), layer.bias)
    (whole,) = torch.autograd.grad(y.square().sum(), layer.weight)
    assert (whole[:, ~KEEP] != 0).any()
    torch.testing.assert_close(layer.weight.grad, torch.where(KEEP, whole, 0))
    sampler.remove()

    mk.remove_mixout(model)
    found = _gradients(model, x, torch.ones(5, 4))
    assert (found["weight"][:, ~KEEP] == 0).all()
    assert (found["weight"][:, KEEP] != 0).all()
    mk.remove_graddrop(model)
    assert type(model[0]) is nn.Linear
    assert "columns" not in vars(model[0])


def test_copies_and_pickles_keep_their_columns() -> None:
    plain, model = _models()
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = _whole(plain, x, g)["weight"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(_gradients(other, x, g)["weight"], expected)


def test_compiled_layer_trains_the_same_columns() -> None:
    plain, model = _models()
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = _whole(plain, x, g)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    compiled(x).backward(g)
    torch.testing.assert_close(model[0].weight.grad, expected["weight"])
    torch.testing.assert_close(x.grad, expected["x"])


def test_columns_of_a_conv1d_are_its_rows() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(4, 6))
    plain = copy.deepcopy(model)
    mk.apply_graddrop(model, keep={"0.weight": KEEP})
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = _gradients(plain, x, g)["weight"] * KEEP[:, None]
    torch.testing.assert_close(_gradients(model, x, g)["weight"], expected)


def test_tied_weight_is_masked_by_a_hook() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    report = mk.apply_graddrop(model, keep={"0.weight": KEEP})
    assert not report.layers
    model(torch.randn(5, 6)).square().sum().backward()
    gradient = model[0].weight.grad
    assert isinstance(gradient, Tensor)
    assert (gradient[:, ~KEEP] == 0).all()
    assert (gradient[:, KEEP] != 0).any()


def test_report_says_how_the_columns_train() -> None:
    _, model = _models()
    report = mk.apply_graddrop(model, keep={"0.weight": KEEP})
    assert report.layers == {"0": "Linear, 50.0% of columns kept"}
    assert "3 columns train" in repr(model)


def test_wrong_name_among_right_ones_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"apply_graddrop: keep: expected names of parameters"):
        mk.apply_graddrop(model, keep={"0.weight": KEEP, "1.weight": KEEP})
    assert type(model[0]) is nn.Linear
