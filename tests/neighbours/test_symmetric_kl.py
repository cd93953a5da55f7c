"""mk.symmetric_kl: values, its closed-form backward, what it saves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mixout_kernels as mk

A = torch.tensor([[2, 0, -1], [0.5, 0.5, 0]], dtype=torch.float64)
B = torch.tensor([[1.5, 0.25, -1], [0, 1, 0]], dtype=torch.float64)


def plain(a, b, ignore=None):
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    rows = ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(-1)
    return rows.mean() if ignore is None else rows[~ignore].mean()


def test_by_hand():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    value = mk.symmetric_kl(a, b)
    value.backward()
    assert value.item() == pytest.approx(0.1312162176, abs=1e-10)
    expected = [[0.1015537613, -0.084307597, -0.0172461643], [0.1817680196, -0.1921455096, 0.01037749]]
    torch.testing.assert_close(a.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_loss_of_r3f_by_hand():
    cross_entropy = F.cross_entropy(A, torch.tensor([0, 1]))
    assert cross_entropy.item() == pytest.approx(0.5639330538, abs=1e-10)
    assert (cross_entropy + mk.symmetric_kl(A, B)).item() == pytest.approx(0.6951492714, abs=1e-10)
    assert (cross_entropy + 0.7 * mk.symmetric_kl(A, B)).item() == pytest.approx(0.6557844061, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    classes=st.integers(1, 9),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(shape, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        (scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)).requires_grad_() for _ in "ab"
    )
    ignore = None
    if shape and seed % 2:
        ignore = torch.rand(shape, generator=generator) < 0.5
        ignore.view(-1)[0] = False
    found = torch.autograd.grad(3 * mk.symmetric_kl(a, b, ignore=ignore), (a, b))
    expected = torch.autograd.grad(3 * plain(a, b, ignore), (a, b))
    torch.testing.assert_close(mk.symmetric_kl(a, b, ignore=ignore), plain(a, b, ignore), rtol=1e-9, atol=1e-13)
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


def test_gradcheck_in_several_blocks():
    """A vocabulary of which a block holds one row."""
    a, b = (torch.randn(3, 2, 70_000, dtype=torch.float64, requires_grad=True) for _ in "ab")
    found = torch.autograd.grad(mk.symmetric_kl(a, b), (a, b))
    for gradient, exact in zip(found, torch.autograd.grad(plain(a, b), (a, b)), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-15)
    small = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in "ab"]
    assert torch.autograd.gradcheck(mk.symmetric_kl, small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    a, b = (torch.randn(6, 11).to(dtype).requires_grad_() for _ in "ab")
    value = mk.symmetric_kl(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain(a.float(), b.float()))
    gradient, *_ = torch.autograd.grad(value, (a, b))
    assert gradient.dtype == dtype
    exact, *_ = torch.autograd.grad(plain(a.double(), b.double()), (a, b))
    torch.testing.assert_close(gradient, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_only_one_side_needs_a_gradient():
    a, b = A.clone().requires_grad_(), B.clone()
    expected = torch.autograd.grad(plain(a, b), a)[0]
    torch.testing.assert_close(torch.autograd.grad(mk.symmetric_kl(a, b), a)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(mk.symmetric_kl(b, a), a)[0], expected)


def test_ignored_rows_have_no_part_even_if_they_are_nan():
    a, b = A.clone().requires_grad_(), B.clone()
    with torch.no_grad():
        a[1] = float("nan")
    ignore = torch.tensor([False, True])
    value = mk.symmetric_kl(a, b, ignore=ignore)
    torch.testing.assert_close(value, plain(A[:1], B[:1]))
    value.backward()
    assert a.grad[0].isfinite().all()
    assert not a.grad[1].any()
    assert mk.symmetric_kl(A, B, ignore=torch.tensor([True, True])) == 0
    assert mk.symmetric_kl(a, b).isnan()


def test_classes_that_are_masked_in_both():
    infinite = torch.full((2, 1), -torch.inf, dtype=torch.float64)
    a, b = torch.cat([A, infinite], 1).requires_grad_(), torch.cat([B, infinite], 1)
    value = mk.symmetric_kl(a, b)
    torch.testing.assert_close(value, plain(A, B))
    value.backward()
    assert a.grad.isfinite().all()
    assert mk.symmetric_kl(A, torch.cat([A[:, :2], infinite], 1)) == torch.inf  # in one only


def test_saves_the_logits_and_four_numbers_a_row():
    a, b = (torch.randn(8, 1000, requires_grad=True) for _ in "ab")
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mk.symmetric_kl(a, b)
    logits = {a.data_ptr(), b.data_ptr()}
    others = sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in logits)
    assert logits <= {tensor.data_ptr() for tensor in saved}
    assert others == 4 * 8 + 1  # and how many rows count


def test_errors():
    with pytest.raises(
        TypeError, match=r"symmetric_kl: a: expected a floating-point tensor of logits, got torch.int64"
    ):
        mk.symmetric_kl(torch.ones(2, 2, dtype=torch.int64), B)
    with pytest.raises(TypeError, match=r"symmetric_kl: b: expected a floating-point tensor of logits, got list"):
        mk.symmetric_kl(A, [1.0])
    with pytest.raises(
        ValueError, match=r"symmetric_kl: b: expected the shape of a, \[..., classes\], got \[1, 3\] and"
    ):
        mk.symmetric_kl(A, B[:1])
    with pytest.raises(ValueError, match=r"symmetric_kl: ignore: expected bool \[2\], got torch.int64 \[2\]"):
        mk.symmetric_kl(A, B, ignore=torch.tensor([0, 1]))
