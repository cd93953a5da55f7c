"""The parts of a sample, on a stand-in for torch.cuda that notes what is asked of it."""

import contextlib

import pytest
import torch

from benchmarks.common import clocks
from benchmarks.layers.measurement import Phases

CUDA = torch.device("cuda")


class FakeCuda:
    """Forward takes 8 ms and backward 24 ms by its events; graphs record the calls made under their capture."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        log = self.log

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.position = sum(entry.startswith("record") for entry in log) % 3
                log.append(f"record {self.position}")

            def synchronize(self):
                log.append(f"synchronize {self.position}")

            def elapsed_time(self, later):
                return {(0, 1): 8.0, (1, 2): 24.0}[self.position, later.position]

        class Graph:
            def replay(self):
                log.append(f"replay {self.captured}")

        @contextlib.contextmanager
        def capture(graph, pool):
            assert pool == "pool"
            before = len(log)
            yield
            graph.captured = "+".join(log[before:])
            log.append("captured")

        class Stream:
            def wait_stream(self, stream):
                pass

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


class LoggedPhases(Phases):
    def __init__(self, log, calls):
        super().__init__(lambda operands: torch.empty(0), [None] * calls, has_backward=True)
        self.log = log

    def forward(self):
        self.log.append("forward")
        super().forward()

    def backward(self):
        assert len(self._outputs) == len(self.operands)
        self.log.append("backward")


@pytest.mark.parametrize("pool", ["pool", None])
def test_a_sample_is_n_calls_of_each_phase_and_one_synchronisation(monkeypatch, pool):
    fake = FakeCuda(monkeypatch)
    sample = LoggedPhases(fake.log, calls=4).sampler(CUDA, pool)
    fake.log.clear()
    assert sample() == (0.002, 0.006)
    phases = ["replay forward", "replay backward"] if pool else ["forward", "backward"]
    assert fake.log == ["record 0", phases[0], "record 1", phases[1], "record 2", "synchronize 2"]


def test_warm_up_is_not_captured(monkeypatch):
    fake = FakeCuda(monkeypatch)
    LoggedPhases(fake.log, calls=1).sampler(CUDA, "pool")
    assert fake.log == ["forward", "backward"] * 3 + ["forward", "captured", "backward", "captured"]


@pytest.mark.parametrize(("threads", "clock"), [(2, "perf_counter"), (1, "process_time")])
def test_seconds_by_the_clock(threads, clock, monkeypatch):
    times = iter([1.0, 1.5, 3.5])
    monkeypatch.setattr(clocks.time, clock, lambda: next(times))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done = []
    sample = clocks.sampler([lambda: done.append("a"), lambda: done.append("b")], torch.device("cpu"), calls=2)
    assert sample() == (0.25, 1.0)
    assert done == ["a", "b"]
