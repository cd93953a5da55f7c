"""What is kept for backward, in bytes, and what is allocated on the way there."""

import pytest
import torch
import torch.nn.functional as F

import mixout_kernels as mk

from . import axes, budget


def saved_by(problem, case, needs="xwb", **context):
    """The tensors that a call saves for backward, each once, without the parameters and the target."""
    x, w, b = budget.leaves(problem)
    for leaf, name in ((x, "x"), (w, "w"), (b, "b")):
        leaf.requires_grad_(name in needs)
    saved = {}

    def pack(t):
        saved[t.data_ptr(), t.shape] = t
        return t

    seed = torch.tensor([problem.seed], dtype=torch.int64, device=case.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = mk.mix_linear(
            x, w, problem.u, b, p=problem.p, mask=problem.mask, seed=seed, backend=case.backend, **context
        )
    known = {t.data_ptr() for t in (w, b, problem.u) if t is not None}
    assert y.requires_grad == bool(needs)
    return [t for t in saved.values() if t.data_ptr() not in known and t.numel() > 0], x


def saved_columns(problem, case):
    """Exactly the kept ones, or a capacity where their number must not be read back from the device: the plans of the
    CUDA kernels have that in emulation, too.
    """
    if case.device == "cpu" and case.backend != "cuda":
        return int(problem.keep[0].sum())
    return mk.draws.column_capacity(problem.w.shape[1], problem.p)


def nbytes(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


@axes.wide_and_narrow
@axes.targets
@pytest.mark.parametrize("rows", [(33,), (4, 33)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.7, 0.9])
def test_neuron_mask_keeps_the_kept_columns_and_the_seed(case, dtype, target, rows, p):
    problem = budget.random_problem(rows, 400, 300, dtype=dtype, device=case.device, p=p, target=target)
    saved, _ = saved_by(problem, case)
    n_rows = problem.g.numel() // 300
    assert nbytes(saved) == n_rows * saved_columns(problem, case) * dtype.itemsize + 8
    assert sorted(t.dtype.itemsize for t in saved) == sorted([dtype.itemsize, 8])


@axes.wide_and_narrow
@axes.targets
def test_weight_mask_keeps_the_input_itself_and_the_seed(case, dtype, target):
    problem = budget.random_problem((33,), 400, 300, dtype=dtype, device=case.device, mask="weight", target=target)
    saved, x = saved_by(problem, case)
    new = [t for t in saved if t.data_ptr() != x.data_ptr()]
    assert len(saved) == 2
    assert nbytes(new) == 8


@axes.masks
@pytest.mark.parametrize("needs", ["x", "b", "xb"])
def test_a_frozen_weight_keeps_the_seed_alone(case, mask, needs):
    problem = budget.random_problem((33,), 400, 300, device=case.device, mask=mask)
    saved, _ = saved_by(problem, case, needs)
    assert nbytes(saved) == 8


def test_autocast_keeps_the_kept_columns_of_the_cast_input(case):
    case.require(torch.float32, None, torch.bfloat16)
    problem = budget.random_problem((33,), 400, 300, device=case.device)
    with torch.autocast(case.device, torch.bfloat16):
        saved, _ = saved_by(problem, case)
    assert nbytes(saved) == 33 * saved_columns(problem, case) * 2 + 8


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_p_0_and_p_1_keep_no_copy(case, p):
    problem = budget.random_problem((33,), 400, 300, device=case.device, p=p)
    saved, x = saved_by(problem, case)
    assert nbytes([t for t in saved if t.data_ptr() != x.data_ptr()]) <= 8


def allocations(run):
    """Bytes of every allocation on the CPU while ``run()`` runs, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    return sorted((event.nbytes() for event in events if event.nbytes() > 0), reverse=True)


@axes.masks
@axes.targets
def test_mixout_allocates_its_result_and_nothing_else_of_that_size(case, mask, target):
    if case.backend != "cpu":
        pytest.skip("the CPU allocator is what the profiler sees here")
    problem = budget.random_problem((1,), 400, 300, mask=mask, target=target)
    seed = torch.tensor([1])
    sizes = allocations(lambda: mk.mixout(problem.w, problem.u, p=0.7, mask=mask, seed=seed, backend="cpu"))
    assert sizes[0] == problem.w.nbytes
    assert sum(sizes[1:]) < problem.w.nbytes / 100


@axes.transposed
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_staged_forward_allocates_the_mixed_weight_once(case, transposed, low):
    """One temporary of the weight's size, in the dtype of the product: no mask, no difference, no cast."""
    if case.backend != "cpu":
        pytest.skip("the CPU allocator is what the profiler sees here")
    problem = budget.random_problem((4,), 400, 300, transposed=transposed)
    seed = torch.tensor([1])

    def run(function, weight, *target, **options):
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            return function(problem.x, weight, *target, problem.b, **options)

    def large(*arguments, **options):
        run(*arguments, **options)  # first, what the product allocates once and for all
        return [size for size in allocations(lambda: run(*arguments, **options)) if size > weight_bytes / 4]

    dtype = low or torch.float32
    weight_bytes = 400 * 300 * dtype.itemsize
    of_the_product = large(F.linear, problem.w.to(dtype))
    of_the_layer = large(mk.mix_linear, problem.w, problem.u, p=0.7, seed=seed, backend="cpu", schedule="staged")
    assert sorted(of_the_layer) == sorted([*of_the_product, weight_bytes])


@axes.transposed
@axes.masks
@axes.targets
def test_fused_products_allocate_their_results_alone(case, mask, target, transposed):
    """Phi never lies in memory: y and dx are larger than the weight here, and nothing else of its size comes to be."""
    if case.backend != "cpu" or "fused" not in case.schedules():
        pytest.skip("the CPU allocator is what the profiler sees here, and only with AVX2 the product is fused")
    problem = budget.random_problem((400,), 200, 200, p=0.9, mask=mask, target=target, transposed=transposed)
    problem.x.requires_grad_()
    seed = torch.tensor([1])
    options = {"p": 0.9, "mask": mask, "seed": seed, "backend": "cpu", "schedule": "fused"}

    def large(run):
        return [size for size in allocations(run) if size >= problem.w.nbytes / 2]

    y = mk.mix_linear(problem.x, problem.w, problem.u, problem.b, **options)
    assert large(lambda: mk.mix_linear(problem.x, problem.w, problem.u, problem.b, **options)) == [y.nbytes]
    backward = large(lambda: torch.autograd.grad(y, problem.x, problem.g))
    assert backward == [problem.x.nbytes]


@axes.transposed
@pytest.mark.parametrize("mask", ["neuron", "weight", "output", "layer"])
def test_a_masked_gradient_of_the_plain_weight_allocates_its_results_alone(case, mask, transposed):
    """At p = 0 the products read w itself: nothing is mixed, and nothing of the weight's size is made but dw."""
    if case.backend != "cpu":
        pytest.skip("the CPU allocator is what the profiler sees here")
    problem = budget.random_problem((4,), 400, 300, p=0.0, mask=mask, transposed=transposed)
    for leaf in (problem.x, problem.w):
        leaf.requires_grad_()
    seed = torch.tensor([5])

    def large(run):
        return [size for size in allocations(run) if size > problem.w.nbytes / 4]

    for schedule in case.schedules():
        options = {"p": 0.0, "grad_p": 0.5, "mask": mask, "seed": seed, "backend": "cpu", "schedule": schedule}

        def forward(options=options):
            return mk.mix_linear(problem.x, problem.w, None, problem.b, **options)

        y = forward()  # and what the product allocates once and for all
        torch.autograd.grad(y, (problem.x, problem.w), problem.g)
        assert large(forward) == []
        y = forward()
        # dw itself; where it is scattered, the product of the kept half of the columns comes before it.
        backward = large(lambda y=y: torch.autograd.grad(y, (problem.x, problem.w), problem.g))
        kept = int(mk.keep_mask(seed, p=0.5, shape=problem.w.shape, mask=mask).sum()) if mask == "neuron" else 0
        assert sorted(backward) == sorted([problem.w.nbytes, *[kept * 300 * 4] * (kept > 0)])
