"""MixLinear and MixConv1D as modules: an nn.Linear in everything but the training forward."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixout_kernels as mk

from . import axes
from .memory import keep_of


def linear_of(device="cpu", **options):
    torch.manual_seed(1)
    return nn.Linear(20, 12, **options).to(device)


def moved(module, by=0.25):
    """The module after training: its weight is no longer its target."""
    with torch.no_grad():
        module.weight.add_(by)
    return module


def run(module, x, seed=5):
    torch.manual_seed(seed)
    return module(x)


def expected_output(module, x, seed=5):
    torch.manual_seed(seed)
    return mk.mix_linear(x, module.weight, module.target, module.bias, p=module.p, mask=module.mask)


@axes.masks
@pytest.mark.parametrize("bias", [True, False])
def test_constructor_is_that_of_linear(mask, bias):
    torch.manual_seed(3)
    linear = nn.Linear(20, 12, bias, "cpu", torch.float64)
    torch.manual_seed(3)
    module = mk.MixLinear(20, 12, bias, "cpu", torch.float64, p=0.3, mask=mask)
    assert isinstance(module, nn.Linear)
    assert torch.equal(module.weight, linear.weight)
    assert (module.bias is None) == (not bias)
    assert module.target is None
    assert module.p == 0.3
    assert module.mask == mask
    assert list(module.state_dict()) == list(linear.state_dict())


@axes.masks
def test_forward_is_mix_linear(device, mask):
    module = moved(mk.MixLinear.from_linear(linear_of(device), p=0.5, mask=mask))
    x = torch.randn(7, 20, device=device)
    y = run(module, x)
    assert torch.equal(y, expected_output(module, x))
    # Each output is x times the mixed weight of the mask that manual_seed governs, computed here by hand.
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = keep_of(module.weight, 0.5, mask, seed)
    phi = torch.where(keep, module.target + (module.weight - module.target) * 2, module.target)
    torch.testing.assert_close(y, F.linear(x, phi, module.bias))


def test_eval_mode_is_linear_bit_for_bit(device):
    linear = linear_of(device)
    module = moved(mk.MixLinear.from_linear(linear, p=0.5)).eval()
    x = torch.randn(7, 20, device=device)
    assert torch.equal(module(x), F.linear(x, linear.weight, linear.bias))
    assert not torch.equal(module.train()(x), module.eval()(x))


def test_masks_are_fresh_and_governed_by_manual_seed(device):
    module = moved(mk.MixLinear.from_linear(linear_of(device), p=0.5))
    x = torch.randn(7, 20, device=device)
    assert torch.equal(run(module, x), run(module, x))
    assert not torch.equal(run(module, x), module(x))


def test_from_linear_shares_parameters_and_copies_the_target():
    linear = linear_of()
    linear.eval()
    linear.note = "kept"
    module = mk.MixLinear.from_linear(linear, p=0.5)
    assert module.weight is linear.weight
    assert module.bias is linear.bias
    assert torch.equal(module.target, linear.weight)
    assert module.target.data_ptr() != linear.weight.data_ptr()
    assert not module.target.requires_grad
    assert not module.training
    assert module.note == "kept"
    assert type(linear) is nn.Linear
    assert "target" not in linear._buffers


def test_from_linear_with_a_target_does_not_copy_it():
    linear, target = linear_of(), torch.randn(12, 20)
    assert mk.MixLinear.from_linear(linear, p=0.5, target=target).target is target


def test_a_target_that_is_a_parameter_is_taken_as_a_tensor():
    """Torch would register a Parameter, and refuse a second one of that name after it has dropped the first."""
    frozen = nn.Parameter(torch.ones(12, 20), requires_grad=False)
    module = mk.MixLinear(20, 12, p=0.5, target=torch.zeros(12, 20))
    module.target = frozen
    for layer in (module, mk.MixLinear(20, 12, p=0.5, target=frozen)):
        assert type(layer.target) is torch.Tensor
        assert layer.target.data_ptr() == frozen.data_ptr()
        assert set(dict(layer.named_parameters())) == {"weight", "bias"}


@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampler"])
def test_a_parametrized_weight_is_computed_once_a_forward_and_never_by_a_move(sampled):
    """As in nn.Linear: spectral_norm takes a step of its power iteration each time."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return weight

    model = nn.Sequential(mk.MixLinear.from_linear(linear_of(), p=0.5))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Counted(), unsafe=True)
    if sampled:
        mk.MixSampler(model)
    for _ in range(3):
        Counted.calls = 0
        model(torch.randn(2, 20))
        assert Counted.calls == 1
    model.float()
    assert Counted.calls == 1


def test_target_is_not_trained(device):
    module = mk.MixLinear.from_linear(linear_of(device), p=0.5)
    target = module.target.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        module(torch.randn(7, 20, device=device)).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.target, target)
    assert not torch.equal(module.weight, target)
    assert len(list(module.parameters())) == 2


def test_state_dict_has_the_keys_of_linear_and_loads_both_ways():
    linear, module = linear_of(), moved(mk.MixLinear.from_linear(linear_of(), p=0.5))
    assert list(module.state_dict()) == ["weight", "bias"] == list(linear.state_dict())
    linear.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(linear.weight, module.weight)
    other = linear_of()
    with torch.no_grad():
        other.weight.neg_()
    target = module.target.clone()
    module.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(module.target, target)


def test_target_is_no_buffer():
    """So that DistributedDataParallel does not broadcast it, and exported programs do not hold it."""
    module = mk.MixLinear.from_linear(linear_of(), p=0.5)
    assert not list(module.buffers())
    x = torch.randn(2, 20)
    program = torch.export.export(module.eval(), (x,))
    assert program.state_dict.keys() == {"weight", "bias"}
    assert not program.constants
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(dtype=torch.bfloat16), torch.bfloat16),
    ],
    ids=["to", "double", "half", "bfloat16", "to-bfloat16"],
)
def test_target_follows_the_dtype(device, move, dtype):
    module = move(moved(mk.MixLinear.from_linear(linear_of(device), p=0.5)))
    x = torch.randn(7, 20, device=device, dtype=dtype, requires_grad=True)
    y = run(module, x)
    y.sum().backward()
    assert module.target.dtype == module.weight.dtype == y.dtype == module.weight.grad.dtype == dtype
    assert torch.equal(y, expected_output(module, x))


def test_target_follows_the_device():
    module = mk.MixLinear.from_linear(linear_of(), p=0.5).to("meta")
    assert module.target.device.type == module.weight.device.type == "meta"


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: save_and_load(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "no target"])
def test_copies_are_whole_and_independent(duplicate, kind):
    module = {
        "linear": lambda: mk.MixLinear.from_linear(linear_of(), p=0.5),
        "no target": lambda: mk.MixLinear(20, 12, p=0.5),
        "conv1d": lambda: mk.MixConv1D.from_conv1d(conv1d(12, 20), p=0.5),
    }[kind]()
    moved(module)
    other = duplicate(module)
    x = torch.randn(7, 20)
    assert type(other) is type(module)
    assert torch.equal(run(other, x), run(module, x))
    before = run(module, x)
    moved(other)
    if other.target is not None:
        other.target.zero_()
    assert torch.equal(run(module, x), before)
    assert not torch.equal(run(other, x), before)
    assert list(other.state_dict()) == ["weight", "bias"]


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_functional_call(device):
    module = moved(mk.MixLinear.from_linear(linear_of(device), p=0.5))
    x = torch.randn(7, 20, device=device)
    weight = (module.weight * 2).detach().requires_grad_()
    torch.manual_seed(5)
    y = torch.func.functional_call(module, {"weight": weight}, (x,))
    torch.manual_seed(5)
    assert torch.equal(y, mk.mix_linear(x, weight, module.target, module.bias, p=0.5))
    y.sum().backward()
    assert weight.grad is not None
    assert module.weight.grad is None


@axes.masks
def test_func_grad(device, mask):
    """torch.func differentiates through its own interpreter, not through the autograd engine: the reference's job."""
    module = moved(mk.MixLinear.from_linear(linear_of(device), p=0.5, mask=mask))
    x = torch.randn(7, 20, device=device)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    torch.manual_seed(5)
    gradients = torch.func.grad(loss)(parameters)
    run(module, x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(3, 20), torch.randn(2, 20)], layout=layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nested(torch.jagged),
            "input: expected a dense tensor, got a nested one; of a jagged one give",
        ),
        (lambda: nested(torch.strided), "input: expected a dense tensor, got a nested one"),
        (
            lambda: torch.randn(3, 20).to_sparse(),
            "input: expected a dense tensor, got one with layout torch.sparse_coo",
        ),
    ],
    ids=["jagged", "nested", "sparse"],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_inputs_that_are_not_dense(make, message):
    module = mk.MixLinear.from_linear(linear_of(), p=0.5)
    with pytest.raises(TypeError, match=f"^mix_linear: {message}"):
        module(make())


def test_the_values_of_a_jagged_input():
    module, input = mk.MixLinear.from_linear(linear_of(), p=0.5), nested(torch.jagged)
    y = torch.nested.nested_tensor_from_jagged(run(module, input.values()), input.offsets())
    assert [tuple(part.shape) for part in y.unbind()] == [(3, 12), (2, 12)]


def test_fx_traces_what_draws_no_masks():
    """A trace of a training forward would hold one mask for ever."""
    model = nn.Sequential(mk.MixLinear.from_linear(linear_of(), p=0.5))
    with pytest.raises(TypeError, match=r"^MixLinear: input: expected a tensor, got a torch\.fx\.Proxy: a layer that"):
        torch.fx.symbolic_trace(model)
    traced, x = torch.fx.symbolic_trace(model.eval()), torch.randn(7, 20)
    assert torch.equal(traced(x), model(x))


def test_batched_gradients_by_the_reference():
    module, x = mk.MixLinear.from_linear(linear_of(), p=0.5), torch.randn(3, 20)
    with mk.kernels(backend="reference"):
        y = run(module, x)
        rows = torch.eye(36).reshape(36, 3, 12)
        batched = torch.autograd.grad(y, module.weight, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, gradient in zip(rows, batched, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, module.weight, row, retain_graph=True)[0])


def test_repr_says_what_it_is():
    module = mk.MixLinear.from_linear(linear_of(), p=0.25, mask="weight")
    assert repr(module) == (
        "MixLinear(in_features=20, out_features=12, bias=True, p=0.25, mask='weight', target=frozen)"
    )
    assert "target=zero" in repr(mk.MixLinear(2, 3, p=0.5))


# --- transformers' Conv1D ---------------------------------------------------------------------------------------------


def conv1d(nf, nx):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(1)
    return pytorch_utils.Conv1D(nf, nx)


@axes.masks
def test_conv1d_is_the_linear_of_its_transpose(device, mask):
    conv = conv1d(12, 20).to(device)
    linear = nn.Linear(20, 12).to(device)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    ours = moved(mk.MixConv1D.from_conv1d(conv, p=0.5, mask=mask))
    theirs = moved(mk.MixLinear.from_linear(linear, p=0.5, mask=mask))
    assert ours.weight is conv.weight
    assert ours.weight.shape == (20, 12)
    x = torch.randn(2, 7, 20, device=device)
    y = run(ours, x)
    torch.testing.assert_close(y, run(theirs, x))
    y.square().sum().backward()
    run(theirs, x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad.t(), theirs.weight.grad)
    assert torch.equal(ours.eval()(x), F.linear(x, conv.weight.t(), conv.bias))
    torch.testing.assert_close(ours(x), conv(x))


def test_conv1d_neuron_mask_is_over_the_input_features():
    """The rows of its [in, out] weight: a row of the gradient is zero or not, a column never is."""
    conv = mk.MixConv1D.from_conv1d(conv1d(12, 20), p=0.5)
    run(conv, torch.randn(7, 20)).sum().backward()
    torch.manual_seed(5)
    keep = mk.keep_mask(torch.randint(-(2**63), 2**63 - 1, (1,)), p=0.5, shape=(12, 20))
    assert torch.equal(conv.weight.grad.ne(0).any(dim=1), keep)
    assert conv.weight.grad.ne(0).any(dim=0).all()


def test_conv1d_repr():
    module = mk.MixConv1D.from_conv1d(conv1d(12, 20), p=0.25)
    assert repr(module) == "MixConv1D(nf=12, nx=20, p=0.25, mask='neuron', target=frozen)"
