"""``mk.kernels``: a backend and a schedule for a block of code."""

import threading

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels import backends

from . import budget

PROBLEM = budget.random_problem((3,), 40, 24, p=0.5)


def grad_fn_of_a_layer():
    """The reference differentiates plain PyTorch, the kernels one Function."""
    x, w, _ = budget.leaves(PROBLEM)
    return type(mk.mix_linear(x, w, PROBLEM.u, p=0.5, seed=1).grad_fn).__name__


def test_chooses_for_the_block_and_restores():
    outside = grad_fn_of_a_layer()
    with mk.kernels(backend="reference"):
        assert "Mm" in grad_fn_of_a_layer() or "Addmm" in grad_fn_of_a_layer()
        assert backends.selected(None, None) == ("reference", None)
    assert grad_fn_of_a_layer() == outside
    with pytest.raises(ZeroDivisionError), mk.kernels(backend="reference"):
        raise ZeroDivisionError
    assert backends.selected(None, None) == (None, None)


def test_an_inner_context_and_an_argument_go_first():
    with mk.kernels(backend="cpu", schedule="staged"):
        with mk.kernels(backend="reference"):
            assert backends.selected(None, None) == ("reference", "staged")
        with mk.kernels(schedule="fused"):
            assert backends.selected(None, None) == ("cpu", "fused")
        assert backends.selected("triton", None) == ("triton", "staged")
        assert backends.selected(None, "fused") == ("cpu", "fused")


def test_never_falls_back():
    with mk.kernels(backend="cuda"), pytest.raises(RuntimeError, match=r"^backend='cuda' was asked for, but "):
        grad_fn_of_a_layer()
    x = torch.ones(2, 4, dtype=torch.float64)
    with mk.kernels(schedule="fused"), pytest.raises(RuntimeError, match=r"^schedule='fused' was asked for, but no "):
        mk.mix_linear(x, x, None, p=0.5)


def test_a_parameter_by_itself_has_a_backend_but_no_schedule():
    with mk.kernels(schedule="fused"):
        assert mk.mixout(torch.ones(2, 4, dtype=torch.float64), None, p=0.5).shape == (2, 4)
        assert mk.keep_mask(1, p=0.5, shape=(4,)).shape == (4,)
    with mk.kernels(backend="cuda"), pytest.raises(RuntimeError, match=r"^backend='cuda'"):
        mk.mixout(torch.ones(2, 4), None, p=0.5)


def test_is_of_its_thread():
    seen = []
    with mk.kernels(backend="reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.selected(None, None)))
        thread.start()
        thread.join()
    assert seen == [(None, None)]


@pytest.mark.parametrize("options", [{"backend": "tpu"}, {"schedule": "quick"}], ids=str)
def test_other_names(options):
    ((name, value),) = options.items()
    with (
        pytest.raises(ValueError, match=rf"^kernels: {name}: expected one of None, .*, got '{value}'$"),
        mk.kernels(**options),
    ):
        pass


def operators_of(compiled_graphs):
    return {str(node.target) for graph in compiled_graphs for node in graph.graph.nodes if node.op == "call_function"}


def test_compiled_code_is_compiled_anew_for_another_choice():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    layer = mk.MixLinear(40, 24, p=0.5)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    compiled(PROBLEM.x)
    with mk.kernels(backend="reference"):
        compiled(PROBLEM.x)
    compiled(PROBLEM.x)
    assert len(graphs) == 2
    fused = [any("mixout_kernels" in name for name in operators_of([graph])) for graph in graphs]
    assert fused == [True, False]


def test_compiling_beside_a_thread_that_chose_otherwise_is_an_error():
    compiled = torch.compile(nn.Sequential(mk.MixLinear(40, 24, p=0.5)), backend="eager", fullgraph=True)
    entered, done = threading.Event(), threading.Event()

    def other():
        with mk.kernels(backend="reference"):
            entered.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    try:
        with pytest.raises(Exception, match=r"expected the same kernels\(\.\.\.\) in every thread"):
            compiled(PROBLEM.x)
    finally:
        done.set()
        thread.join()
    torch._dynamo.reset()
    assert compiled(PROBLEM.x).shape == (3, 24)
