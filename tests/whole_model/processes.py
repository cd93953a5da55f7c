"""Processes over gloo, two unless said otherwise, and what each of them found."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

RANKS = 2


def on_each_rank(function: Callable[[int], Any], folder: Path, ranks: int = RANKS) -> list[Any]:
    """``function(rank)`` of a module's top level, in a process for each rank; what it returns there."""
    context = torch.multiprocessing.start_processes(
        _worker, (function, str(folder), ranks), nprocs=ranks, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail("the processes did not finish in 120 s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _worker(rank: int, function: Callable[[int], Any], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(function(rank), f"{folder}/rank-{rank}.pt")
    dist.barrier()  # a rank that leaves early aborts the other
    dist.destroy_process_group()
