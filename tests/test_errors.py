"""What a wrong call says: the function, the argument, what was expected and what came."""

import re
import warnings

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels import backends
from mixout_kernels.backends import choice

X, W, U, B = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(5, 4), torch.ones(5)
NAN = float("nan")


def linear(input=X, weight=W, target=U, bias=B, **options):
    return mk.mix_linear(input, weight, target, bias, **{"p": 0.5, **options})


def mixout(weight=W, target=U, **options):
    return mk.mixout(weight, target, **{"p": 0.5, **options})


def assert_raises(error, message, call, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(**options)


LINEAR = [
    # shapes
    ({"input": torch.ones(3, 5)}, ValueError, "input: expected [..., 4] for a weight [5, 4], got [3, 5]"),
    ({"input": torch.tensor(1.0)}, ValueError, "input: expected [..., 4] for a weight [5, 4], got []"),
    ({"weight": torch.ones(4), "target": None}, ValueError, "weight: expected [out, in], got [4]"),
    ({"weight": torch.ones(2, 5, 4), "target": None}, ValueError, "weight: expected [out, in], got [2, 5, 4]"),
    ({"bias": torch.ones(4)}, ValueError, "bias: expected [5], got [4]"),
    ({"bias": torch.ones(1, 5)}, ValueError, "bias: expected [5], got [1, 5]"),
    # dtypes
    ({"input": X.double()}, TypeError, "input: expected the weight's dtype torch.float32, got torch.float64"),
    ({"input": X.long()}, TypeError, "input: expected a floating-point tensor, got torch.int64"),
    ({"input": [1.0]}, TypeError, "input: expected a tensor, got list"),
    ({"bias": B.half()}, TypeError, "bias: expected the weight's dtype torch.float32, got torch.float16"),
    ({"bias": True}, TypeError, "bias: expected a tensor, got bool"),
    # devices
    ({"input": X.to("meta")}, ValueError, "input: expected the weight's device cpu, got meta"),
    ({"bias": B.to("meta")}, ValueError, "bias: expected the weight's device cpu, got meta"),
    # choices
    ({"schedule": "quick"}, ValueError, "schedule: expected one of None, 'fused', 'staged', got 'quick'"),
]

BOTH = [
    ({"weight": torch.tensor(1.0), "target": None}, ValueError, "weight: expected one dimension or more, got a scalar"),
    ({"weight": W.long(), "target": None}, TypeError, "weight: expected a floating-point tensor, got torch.int64"),
    ({"weight": W.to(torch.complex64)}, TypeError, "weight: expected a floating-point tensor, got torch.complex64"),
    ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ({"target": torch.zeros(4, 5)}, ValueError, "target: expected the weight's shape [5, 4], got [4, 5]"),
    ({"target": U.to("meta")}, ValueError, "target: expected the weight's device cpu, got meta"),
    (
        {"target": U.double()},
        TypeError,
        "target: expected the weight's dtype torch.float32 or a narrower one, got torch.float64",
    ),
    (
        {"target": U.clone().requires_grad_()},
        ValueError,
        "target: expected a frozen tensor, got one that requires grad; use target.detach()",
    ),
    ({"target": 0}, TypeError, "target: expected a tensor, got int"),
    ({"p": -0.1}, ValueError, "p: expected a number in [0, 1], got -0.1"),
    ({"p": 1.0000001}, ValueError, "p: expected a number in [0, 1], got 1.0000001"),
    ({"p": NAN}, ValueError, "p: expected a number in [0, 1], got nan"),
    ({"p": float("inf")}, ValueError, "p: expected a number in [0, 1], got inf"),
    ({"p": "0.5"}, TypeError, "p: expected a number in [0, 1], got str"),
    ({"p": True}, TypeError, "p: expected a number in [0, 1], got bool"),
    ({"p": None}, TypeError, "p: expected a number in [0, 1], got NoneType"),
    ({"mask": "row"}, ValueError, "mask: expected one of 'neuron', 'weight', 'output', 'layer', got 'row'"),
    ({"mask": None}, ValueError, "mask: expected one of 'neuron', 'weight', 'output', 'layer', got None"),
    ({"mask": ["row"]}, ValueError, "mask: expected one of 'neuron', 'weight', 'output', 'layer', got ['row']"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend: expected one of None, 'reference', 'cpu', 'triton', 'cuda', got 'gpu'",
    ),
    ({"seed": 2**64}, ValueError, f"seed: expected 64 bits, got {2**64}"),
    ({"seed": -(2**63) - 1}, ValueError, f"seed: expected 64 bits, got {-(2**63) - 1}"),
    ({"seed": 1.0}, TypeError, "seed: expected an int, an int64 tensor or None, got float"),
    ({"seed": True}, TypeError, "seed: expected an int, an int64 tensor or None, got bool"),
    (
        {"seed": torch.tensor([1.0])},
        TypeError,
        "seed: expected an int64 tensor with one element, got torch.float32 [1]",
    ),
    (
        {"seed": torch.tensor([1, 2])},
        TypeError,
        "seed: expected an int64 tensor with one element, got torch.int64 [2]",
    ),
    ({"seed": torch.tensor([1]).to("meta")}, ValueError, "seed: expected a tensor on cpu, got one on meta"),
]


@pytest.mark.parametrize(("options", "error", "message"), LINEAR + BOTH, ids=lambda value: str(value)[:60])
def test_mix_linear(options, error, message):
    assert_raises(error, f"mix_linear: {message}", linear, **options)


@pytest.mark.parametrize(("options", "error", "message"), BOTH, ids=lambda value: str(value)[:60])
def test_mixout(options, error, message):
    assert_raises(error, f"mixout: {message}", mixout, **options)


@pytest.mark.parametrize("options", [{"training": False}, {"p": 0}], ids=str)
def test_arguments_are_checked_in_eval_mode_too(options):
    """Or a wrong target would be found only when training starts."""
    assert_raises(
        ValueError,
        "mix_linear: target: expected the weight's shape [5, 4], got [4, 5]",
        linear,
        target=torch.zeros(4, 5),
        **options,
    )


KEEP_MASK = [
    ({"p": 2}, ValueError, "p: expected a number in [0, 1], got 2"),
    ({"p": NAN}, ValueError, "p: expected a number in [0, 1], got nan"),
    ({"mask": "column"}, ValueError, "mask: expected one of 'neuron', 'weight', 'output', 'layer', got 'column'"),
    ({"shape": 10}, TypeError, "shape: expected a sequence of sizes, got int"),
    ({"shape": ()}, ValueError, "shape: expected one or more sizes >= 0, got ()"),
    ({"shape": (3, -1)}, ValueError, "shape: expected one or more sizes >= 0, got (3, -1)"),
    ({"shape": (3, 2.0)}, ValueError, "shape: expected one or more sizes >= 0, got (3, 2.0)"),
    ({"seed": "1"}, TypeError, "seed: expected an int, an int64 tensor or None, got str"),
    ({"seed": torch.tensor([1, 2])}, TypeError, "seed: expected an int64 tensor with one element, got torch.int64 [2]"),
]


@pytest.mark.parametrize(("options", "error", "message"), KEEP_MASK, ids=lambda value: str(value)[:60])
def test_keep_mask(options, error, message):
    assert_raises(error, f"keep_mask: {message}", mk.keep_mask, **{"seed": 1, "p": 0.5, "shape": (3, 4), **options})


def test_keep_mask_needs_a_seed():
    """A mask that nobody can ask for again is of no use: None is not a seed here."""
    with pytest.raises(TypeError, match="seed"):
        mk.keep_mask(None, p=0.5, shape=(3, 4))


MODULE = [
    ({"p": 1.5}, ValueError, "p: expected a number in [0, 1], got 1.5"),
    ({"p": 0.5, "mask": "row"}, ValueError, "mask: expected one of 'neuron', 'weight', 'output', 'layer', got 'row'"),
    ({"p": 0.5, "target": U}, ValueError, "target: expected the weight's shape [2, 3], got [5, 4]"),
]


@pytest.mark.parametrize(("options", "error", "message"), MODULE, ids=str)
def test_modules(options, error, message):
    assert_raises(error, f"MixLinear: {message}", lambda: mk.MixLinear(3, 2, **options))
    assert_raises(error, f"MixLinear: {message}", lambda: mk.MixLinear.from_linear(nn.Linear(3, 2), **options))


def test_from_linear_takes_linears():
    assert_raises(
        TypeError,
        "MixLinear.from_linear: linear: expected an nn.Linear, got Conv2d",
        lambda: mk.MixLinear.from_linear(nn.Conv2d(1, 1, 1), p=0.5),
    )


# --- backends and schedules -------------------------------------------------------------------------------------------


def test_a_named_backend_does_not_fall_back(case):
    """A dtype that no backend takes: by name an error with the reason, without one the reference and a warning."""
    w = torch.ones(5, 4, dtype=torch.float8_e4m3fn, device=case.device)
    with pytest.raises(RuntimeError, match=f"^backend='{case.backend}' was asked for, but .*float8_e4m3fn"):
        mk.mixout(w, None, p=0.5, backend=case.backend)


def test_a_backend_that_is_passed_over_is_mentioned_only_if_none_is_left(monkeypatch):
    """Whoever uses Triton alone need not hear that the CUDA kernels were not built."""
    dtypes = [torch.float32] * 3
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("nowhere", "reference"))
    monkeypatch.setattr(choice, "_reason_against", lambda name, *_: "not built" if name == "nowhere" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, None, "cpu", *dtypes) == "reference"
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("nowhere",))
    with pytest.warns(UserWarning, match="^mixout_kernels: backend 'nowhere' is not used: not built$"):
        assert backends.choose(None, None, "cpu", *dtypes) == "reference"


def test_a_schedule_that_a_backend_does_not_have(case):
    for schedule in {"fused", "staged"} - set(case.schedules()):
        with pytest.raises(RuntimeError, match=f"^backend='{case.backend}' was asked for, but for .* the schedules"):
            linear(*(t.to(case.device) for t in (X, W, U, B)), backend=case.backend, schedule=schedule)


def test_a_schedule_that_no_backend_has_here():
    message = (
        r"^schedule='fused' was asked for, but no backend can follow it here \(cpu: for torch.float64 it has the "
        r"schedules staged here"
    )
    with pytest.raises(RuntimeError, match=message):
        linear(*(t.double() for t in (X, W, U, B)), schedule="fused")


def test_without_a_product_of_its_own_the_cpu_backend_is_staged(case, monkeypatch):
    if case.backend != "cpu":
        pytest.skip("of the cpu backend")
    if "fused" not in case.schedules():
        pytest.skip("NO AVX2 HERE: every other test shows it")
    x, w, options = torch.randn(64, 300), torch.randn(70, 300), {"p": 0.5, "seed": 1, "mask": "weight"}
    fused, staged = (mk.mix_linear(x, w, None, **options, schedule=name) for name in ("fused", "staged"))
    monkeypatch.setattr(backends.load("cpu"), "_HAS_PRODUCT", False)
    choice._reason_against.cache_clear()
    with pytest.raises(RuntimeError, match=r"but for torch.float32 it has the schedules staged here, got schedule='fu"):
        linear(backend="cpu", schedule="fused")
    choice._reason_against.cache_clear()
    y = mk.mix_linear(x, w, None, **options, backend="cpu")
    assert torch.equal(y, staged)
    assert not torch.equal(y, fused)


def test_the_cpu_backend_takes_cpu_tensors(case):
    if case.backend != "cpu":
        pytest.skip("of the cpu backend")
    with pytest.raises(
        RuntimeError,
        match=r"^backend='cpu' was asked for, but the cpu backend takes tensors on the CPU, got device meta$",
    ):
        linear(*(t.to("meta") for t in (X, W, U, B)), backend="cpu")
    with pytest.raises(RuntimeError, match=r"takes a target of the weight's dtype, or bfloat16 for float32, got"):
        linear(target=U.half(), backend="cpu")


def test_reference_follows_no_schedule():
    with pytest.raises((RuntimeError, ValueError), match="schedule"):
        linear(backend="reference", schedule="fused")


def test_meta_tensors_go_through_the_reference():
    """Shape inference without data, as accelerate's and torch's deferred initialisation do."""
    y = linear(*(t.to("meta") for t in (X, W, U, B)), seed=torch.ones(1, dtype=torch.int64, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (3, 5)
