"""Monte Carlo: what mixout is for. Bounds are six standard errors, for fixed seeds.

One call with mask="weight" or "output" on a weight of N equal rows is N independent draws for that row; with
mask="neuron" the same holds for equal columns. So each expectation costs a few calls. mask="layer" is one draw a call.
"""

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels.draws import strides_of

from . import axes

SIGMAS = 6


def draws_of(case):
    return 2000 if case.emulated else 40000


def assert_mean(samples, mean, variance, *, resolution):
    """The mean of ``samples [n, ...]`` within six standard errors, which themselves resolve ``resolution``."""
    error = SIGMAS * (variance / samples.shape[0]) ** 0.5
    assert (error < resolution).all(), "too few draws to tell"
    assert ((samples.double().mean(0) - mean).abs() <= error + 1e-6).all()


@pytest.mark.parametrize("p", [0.2, 0.7])
@pytest.mark.parametrize("target", [True, False], ids=["target", "zero"])
@pytest.mark.parametrize("mask", [mask for mask in axes.MASKS if mask != "layer"])
def test_mixed_weight_has_the_mean_and_variance_of_the_paper(any_case, p, target, mask):
    """E Phi = w and Var Phi = p / (1 - p) (w - u)^2 (Lee, Cho & Kang, section 3)."""
    n = draws_of(any_case)
    w, u = 1 + torch.rand(2, 8, device=any_case.device)
    u = u if target else torch.zeros_like(u)
    by_row = strides_of(mask, (n, 8))[0] != 0
    rows = [t.expand(n, 8) if by_row else t.unsqueeze(1).expand(8, n) for t in (w, u)]
    phi = mk.mixout(rows[0], rows[1] if target else None, p=p, mask=mask, seed=17, backend=any_case.backend)
    samples = (phi if by_row else phi.t()).double()
    variance = p / (1 - p) * (w - u).double() ** 2
    assert_mean(samples, w.double(), variance, resolution=0.5)
    deviations = (samples - w.double()) ** 2
    fourth = ((1 - p) * (p / (1 - p)) ** 4 + p) * (w - u).double() ** 4
    assert_mean(deviations, variance, (fourth - variance**2).clamp(min=0), resolution=1.0)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_output_has_the_mean_of_the_plain_layer(any_case, p):
    n = draws_of(any_case)
    w, u, x = torch.randn(3, 8, device=any_case.device)
    y = mk.mix_linear(x, w.repeat(n, 1), u.repeat(n, 1), p=p, mask="weight", seed=23, backend=any_case.backend)
    variance = p / (1 - p) * ((w - u) * x).double().square().sum()
    assert_mean(y, (w * x).double().sum(), variance, resolution=1.0)


def least_squares(p, columns):
    """L(v) = |X v - t|^2 / (2 m) at w and u, its Hessian, and the penalty that mixout adds to E L."""
    X = torch.randn(40, 6, dtype=torch.float64)
    if columns == "orthonormal":
        X = torch.linalg.qr(X).Q * 40**0.5
    w, u, noise = torch.randn(6).double(), torch.randn(6).double(), torch.randn(40).double()
    t = X @ w + 0.1 * noise  # w is near the optimum: the loss itself does not hide the penalty
    hessian = X.t() @ X / 40
    penalty = p / (2 * (1 - p)) * (hessian.diagonal() * (w - u) ** 2).sum()
    return X, w, u, t, hessian, penalty


@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("columns", ["orthonormal", "general"])
def test_corollary_1_1_per_weight(any_case, p, columns):
    """E L(Phi) >= L(w) + m p / (2 (1 - p)) |w - u|^2 for an m-strongly convex L (Lee, Cho & Kang, Corollary 1.1).

    For a quadratic L the left side is L(w) + p / (2 (1 - p)) sum_i H_ii (w_i - u_i)^2 exactly, which is the right side
    itself where H = m I (orthonormal columns).
    """
    n = draws_of(any_case)
    X, w, u, t, hessian, penalty = least_squares(p, columns)
    device, dtype = any_case.device, torch.float32
    y = mk.mix_linear(
        X.to(device, dtype),
        w.to(device, dtype).repeat(n, 1),
        u.to(device, dtype).repeat(n, 1),
        p=p,
        mask="weight",
        seed=29,
        backend=any_case.backend,
    )
    losses = (y.double().cpu() - t.unsqueeze(1)).square().mean(0) / 2  # one for each draw
    error = SIGMAS * losses.std() / n**0.5
    at_w = (X @ w - t).square().mean() / 2
    assert error < (0.3 if any_case.emulated else 0.1) * penalty, "too few draws to tell"
    assert (losses.mean() - (at_w + penalty)).abs() <= error

    m = torch.linalg.eigvalsh(hessian).min()
    corollary = at_w + m * p / (2 * (1 - p)) * (w - u).square().sum()
    assert losses.mean() + error >= corollary
    if columns == "orthonormal":
        torch.testing.assert_close(at_w + penalty, corollary)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_corollary_1_1_per_neuron(any_case, p):
    """The outputs share the mask, which correlates them and leaves the expectation of their sum as it is."""
    any_case.skip_if_emulated("one call for each draw")
    X, w, u, t, _, penalty = least_squares(p, "general")
    weights = [torch.stack([v, -2 * v]).float().to(any_case.device) for v in (w, u)]
    targets = torch.stack([t, -2 * t], dim=1)
    x = X.float().to(any_case.device)
    n = 2000
    losses = torch.stack(
        [
            (mk.mix_linear(x, *weights, p=p, seed=seed, backend=any_case.backend).double().cpu() - targets)
            .square()
            .sum(1)
            .mean()
            / 2
            for seed in range(n)
        ]
    )
    at_w, penalty = 5 * (X @ w - t).square().mean() / 2, 5 * penalty  # 1^2 + 2^2
    error = SIGMAS * losses.std() / n**0.5
    assert error < 0.3 * penalty
    assert (losses.mean() - (at_w + penalty)).abs() <= error


def test_gradient_is_unbiased_for_a_linear_loss(any_case):
    """E dw = g^T x: the factor 1 / (1 - p) of the true derivative, which the authors' code leaves out."""
    n, p = draws_of(any_case), 0.7
    w = torch.randn(1, 4, device=any_case.device).repeat(n, 1).requires_grad_()
    x, g = torch.randn(4, device=any_case.device), torch.ones(n, device=any_case.device)
    mk.mix_linear(x, w, None, p=p, mask="weight", seed=3, backend=any_case.backend).backward(g)
    exact = x.double()
    assert_mean(w.grad, exact, p / (1 - p) * exact**2, resolution=1.0)
