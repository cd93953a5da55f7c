"""The C++ kernels for a draw of any strides and offset, in each memory layout, called as ``backends/contract.py`` says.

Data are small integers and scales are powers of two, so every sum is exact in float32 and results are compared bit for
bit with the formulas; decisions come from the reference's words on an index that is computed here.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mixout_kernels import _extension, reference
from mixout_kernels.backends.contract import MixedWeight, WeightGradient
from mixout_kernels.draws import Draw

if _extension.load()[0] is None:
    pytest.skip("no compiled extension", allow_module_level=True)

from mixout_kernels.backends import cpu

from . import axes

OUT, IN = 36, 44
# (row, column) strides of a weight [OUT, IN], and the offset.
DECISIONS = {
    "by column": ((0, 1), 0),
    "by column of a shard": ((0, 1), 7),
    "by row": ((1, 0), 0),
    "by row of a shard": ((1, 0), 2**33 + 5),
    "one": ((0, 0), 3),
    "by entry": ((IN, 1), 0),
    "by entry of a shard": ((3 * IN, 1), 2 * IN + 1),
    "by entry of the transpose": ((1, OUT), 0),
    "by entry of a shard of the transpose": ((1, OUT), 6),
    "by entry of an odd transpose": ((1, OUT + 1), 2),
    "by entry beyond 2^31": ((2**31 + 1, 5), 2**40),
    "diagonals": ((1, 1), 0),
    "every third column": ((0, 3), 1),
}
SCHEDULES = cpu.schedules(torch.float32)


@pytest.fixture(params=DECISIONS)
def draw(request):
    strides, offset = DECISIONS[request.param]
    return Draw(torch.tensor([2**40 + 17]), 0.5, strides, offset)


def kept(draw, shape):
    """word(seed, offset + sum of i_d * stride_d) >= floor(p * 2^32), from the definition."""
    index = torch.full(tuple(shape), draw.offset)
    for d, stride in enumerate(draw.strides):
        along = [1] * len(shape)
        along[d] = -1
        index = index + stride * torch.arange(shape[d]).reshape(along)
    return reference.keep_words(draw.seed, index) >= math.floor(draw.p * 2**32)


def integers(*shape, dtype=torch.float32):
    return torch.randint(-4, 5, shape).to(dtype)


def weight_like(transposed, dtype=torch.float32):
    return integers(IN, OUT, dtype=dtype).t() if transposed else integers(OUT, IN, dtype=dtype)


def mixed(weight, target, draw, factor=None):
    u = torch.zeros_like(weight) if target is None else target.to(weight.dtype)
    return torch.where(kept(draw, weight.shape), u + (weight - u) * (draw.scale if factor is None else factor), u)


def equal(ours, expected):
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert torch.equal(ours, expected)


def test_keep_mask(draw):
    equal(cpu.keep_mask(draw, (OUT, IN)), kept(draw, (OUT, IN)))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5000,), (1,)),
        ((5000,), (3,)),
        ((3, 20000), (20000, 1)),
        ((40, 6, 3, 3), (0, 1, 0, 0)),
        ((40, 6, 3, 3), (1, 0, 0, 0)),
        ((40, 6, 3, 3), (54, 9, 3, 1)),
        ((4, 50, 33), (0, 0, 1)),
        ((4, 50, 33), (0, 1, 0)),
        ((4, 2000, 3), (1, 4, 0)),
        ((2, 3, 5), (0, 0, 0)),
        ((7,), (0,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("target", [True, False], ids=["target", "zero"])
def test_mixout_and_keep_mask_in_any_number_of_dimensions(shape, strides, offset, target):
    draw = Draw(torch.tensor([-3]), 0.7, strides, offset)
    weight, u = torch.randn(shape), torch.randn(shape) if target else None
    equal(cpu.keep_mask(draw, shape), kept(draw, shape))
    equal(cpu.mixout(weight, u, draw, 1.25), mixed(weight, u, draw, 1.25))
    for dtype in (torch.float64, torch.bfloat16):  # rounded once
        low, low_u = weight.to(dtype), None if u is None else u.to(dtype)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        expected = mixed(low.to(precise), low_u, draw, 1.25).to(dtype)
        equal(cpu.mixout(low, low_u, draw, 1.25), expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_mixout_list_takes_a_draw_for_each_weight(compute):
    """Each has a p, strides and an offset of its own; shapes, layouts and targets differ too."""
    weights = [weight_like(k % 2 == 1) for k in range(len(DECISIONS))]
    targets = [None if k % 3 == 0 else torch.randn_like(weights[k]) for k in range(len(weights))]
    targets[1] = targets[1].bfloat16()
    draws = [
        Draw(torch.tensor([k]), 0.1 + 0.06 * k, strides, offset)
        for k, (strides, offset) in enumerate(DECISIONS.values())
    ]
    outs = [torch.full_like(weight, math.nan, dtype=compute) for weight in weights]
    cpu.mixout_list(outs, weights, targets, draws)
    for out, weight, target, draw in zip(outs, weights, targets, draws, strict=True):
        equal(out, mixed(weight, target, draw).to(compute))
        assert out.stride() == weight.stride()


@axes.schedules
@axes.transposed
@pytest.mark.parametrize("target", [True, False], ids=["target", "zero"])
@pytest.mark.parametrize("q", [0.5, 0.75])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_products(draw, schedule, transposed, target, q):
    x, g, bias = integers(3, 11, IN), integers(3, 11, OUT), integers(OUT)
    weight, u = weight_like(transposed), weight_like(transposed) if target else None
    phi = MixedWeight(weight, u, None, draw)
    gradient = WeightGradient(draw.at(q), 4.0, None)
    y, saved = cpu.mix_linear(x, phi, bias, gradient, schedule)
    operand, keep = mixed(weight, u, draw), kept(draw.at(q), weight.shape)
    equal(y, F.linear(x, operand, bias))
    rows, g_rows = x.reshape(-1, IN), g.reshape(-1, OUT)
    equal(saved, rows[:, keep[0]] if draw.by_column else torch.empty(33, 0))

    dx, dw, db = cpu.mix_linear_backward(g, saved if draw.by_column else x, phi, gradient, (True, True, True), schedule)
    equal(dx, g @ operand)
    equal(dw, torch.where(keep, 4 * (g_rows.t() @ rows), 0.0))
    assert dw.stride() == weight.stride()
    equal(db, g_rows.sum(0))


@axes.schedules
@pytest.mark.parametrize("lies", [False, True, "a part"], ids=["", "transposed", "a part"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed weight"])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_given_operand_is_what_the_products_read(draw, schedule, lies, transposed):
    """In any memory layout, whatever weight and target hold."""
    operand = integers(OUT, 2 * IN)[:, :IN] if lies == "a part" else weight_like(lies)
    weight = torch.full_like(weight_like(transposed), math.nan)
    phi = MixedWeight(weight, None, operand, draw.at(0.0))
    gradient = WeightGradient(draw.at(0.75), 2.0, None)
    x, g = integers(9, IN), integers(9, OUT)
    y, saved = cpu.mix_linear(x, phi, None, gradient, schedule)
    equal(y, x @ operand.t())
    dx, dw, _ = cpu.mix_linear_backward(g, saved if draw.by_column else x, phi, gradient, (True, True, False), schedule)
    equal(dx, g @ operand)
    equal(dw, torch.where(kept(draw.at(0.75), weight.shape), 2 * (g.t() @ x), 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lies", ["1-D", "2-D", "3-D", "4-D", "strided", "turned", "a part"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_staged_with_the_weight_as_operand_is_f_linear_bit_for_bit(dtype, lies, bias):
    x = {
        "1-D": lambda: torch.randn(300),
        "2-D": lambda: torch.randn(70, 300),
        "3-D": lambda: torch.randn(5, 14, 300),
        "4-D": lambda: torch.randn(2, 5, 7, 300),
        "strided": lambda: torch.randn(70, 3, 300)[:, 1],
        "turned": lambda: torch.randn(14, 5, 300).transpose(0, 1),
        "a part": lambda: torch.randn(5, 14, 400)[..., :300],
    }[lies]().to(dtype)
    w = torch.randn(200, 300, dtype=dtype)
    b = torch.randn(200, dtype=dtype) if bias else None
    # Without an instruction for float16 the library gets contiguous copies in float32; y is rounded once.
    widened = dtype == torch.float16 and not cpu._LIBRARY_MULTIPLIES_F16
    asked = torch.float32 if widened else dtype
    x_leaf = (x.detach().float().contiguous() if widened else x.detach()).requires_grad_()
    w_leaf = w.to(asked, copy=True).requires_grad_()
    expected = F.linear(x_leaf, w_leaf, None if b is None else b.to(asked))
    g = torch.randn_like(expected).to(dtype)
    phi = MixedWeight(w, None, w, Draw(torch.tensor([3]), 0.0, (0, 1)))
    gradient = WeightGradient(phi.draw.at(0.5), 2.0, None)
    y, saved = cpu.mix_linear(x, phi, b, gradient, "staged")
    equal(y, expected.detach().to(dtype))
    dx, _, _ = cpu.mix_linear_backward(g, saved, phi, gradient, (True, False, False), "staged")
    equal(dx, torch.autograd.grad(expected, x_leaf, g.to(asked))[0].to(dtype))


@axes.schedules
@pytest.mark.parametrize("target", [True, False], ids=["target", "zero"])
def test_a_fixed_width_is_filled_with_zeros_and_loses_what_does_not_fit(schedule, target):
    draw = Draw(torch.tensor([11]), 0.5, (0, 1))
    weight, u = weight_like(False), weight_like(False) if target else None
    phi = MixedWeight(weight, u, None, draw)
    x, g = integers(6, IN), integers(6, OUT)
    columns = kept(draw, weight.shape)[0].nonzero().flatten()
    for width in (len(columns) + 5, len(columns), len(columns) - 3):
        gradient = WeightGradient(draw, 2.0, width)
        y, saved = cpu.mix_linear(x, phi, None, gradient, schedule)
        equal(y, F.linear(x, mixed(weight, u, draw)))
        fits = columns[:width]
        equal(saved, F.pad(x[:, fits], (0, width - len(fits))))
        dx, dw, _ = cpu.mix_linear_backward(g, saved, phi, gradient, (True, True, False), schedule)
        equal(dx, g @ mixed(weight, u, draw))
        expected = torch.zeros_like(weight)
        expected[:, fits] = 2 * (g.t() @ x[:, fits])
        equal(dw, expected)


@axes.schedules
@pytest.mark.parametrize("width", [None, 30, 0])
def test_a_saved_input_of_another_mask_is_refused(schedule, width):
    draw = Draw(torch.tensor([11]), 0.5, (0, 1))
    phi = MixedWeight(weight_like(False), None, None, draw)
    x, g = integers(6, IN), integers(6, OUT)
    _, saved = cpu.mix_linear(x, phi, None, WeightGradient(draw.at(0.9), 2.0, None), schedule)
    with pytest.raises(RuntimeError, match=r"saved_input: expected x\[:, kept\] as \[6, \d+\].*got \[6, \d\]"):
        cpu.mix_linear_backward(g, saved, phi, WeightGradient(draw, 2.0, width), (False, True, False), schedule)
    by_entry = Draw(torch.tensor([11]), 0.5, (IN, 1))
    with pytest.raises(RuntimeError, match=r"saved_input: expected x as \[6, 44\], got \[6, \d\]"):
        cpu.mix_linear_backward(g, saved, phi, WeightGradient(by_entry, 2.0, 0), (False, True, False), schedule)


def test_what_no_kernel_can_do_is_refused():
    weight = weight_like(False)
    with pytest.raises(RuntimeError, match="p below 1, got p = 1"):
        cpu.mixout(weight, None, Draw(torch.tensor([1]), 1.0, (0, 1)), 1.0)
    with pytest.raises(RuntimeError, match="a draw of 2 strides, got 1"):
        cpu.mixout_list([torch.empty_like(weight)], [weight], [None], [Draw(torch.tensor([1]), 0.5, (1,))])
    with pytest.raises(TypeError, match="Draw"):
        cpu.mixout_list([torch.empty_like(weight)], [weight], [None], [(0.5, (1, 1))])


def test_auto_is_fused_except_where_the_library_multiplies_faster(monkeypatch):
    """The rule of backends/cpu.py, read off the products that the library is asked for."""
    if "fused" not in SCHEDULES:
        pytest.skip("NO AVX2 HERE: there is one schedule")
    w, u, bias = torch.randn(200, 700), torch.randn(200, 700), torch.randn(200)
    draw = Draw(torch.tensor([3]), 0.5, (0, 1))
    gradient = WeightGradient(draw, 2.0, None)

    def library_products(rows, operand, schedule):
        """The FLOPs of forward and of both that are left to the library: none of a fused layer."""
        phi = MixedWeight(w, u, operand, draw)
        x, g = torch.randn(rows, 700), torch.randn(rows, 200)
        with FlopCounterMode(display=False) as counter:
            _, saved = cpu.mix_linear(x, phi, bias, gradient, schedule)
            forward = counter.get_total_flops()
            cpu.mix_linear_backward(g, saved, phi, gradient, (True, True, False), schedule)
        return forward, counter.get_total_flops()

    def schedules_used(rows, operand):
        found = {name: library_products(rows, operand, name) for name in (*SCHEDULES, "auto")}
        assert found["fused"] == (0, 0)
        assert 0 < found["staged"][0] < found["staged"][1]
        return [name for name in SCHEDULES if found[name] == found["auto"]]

    for rows, operand, with_avx_512 in [(255, None, "fused"), (256, None, "staged"), (255, w, "staged")]:
        monkeypatch.setattr(cpu, "_LIBRARY_IS_FASTER", False)
        assert schedules_used(rows, operand) == ["fused"]
        assert not cpu.premixing_pays(torch.float32)
        monkeypatch.setattr(cpu, "_LIBRARY_IS_FASTER", True)
        assert schedules_used(rows, operand) == [with_avx_512]
        assert cpu.premixing_pays(torch.float32)
