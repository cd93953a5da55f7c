"""Memory is measured in two ways: what a forward keeps for backward, and the peak of a fresh process."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Count what one forward keeps for backward, each storage once, apart from ``known`` ones (parameters, targets)."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, Tensor] = {}  # the tensors themselves: a freed address would be used again

    def note(tensor: Tensor) -> Tensor:
        # Detached, since a node that saves its own output would otherwise own itself, and never be freed.
        tensor = tensor.detach()
        address = tensor.untyped_storage().data_ptr()
        if address not in addresses:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def peak_bytes(job: Callable[..., None], *arguments: Any) -> int | None:
    """Run ``job(*arguments)`` in a fresh process and return how far its resident memory rises above what it had before.

    None where the system does not tell, or the process was killed. ``job`` is a function of a module; what it raises is
    raised here.
    """
    if sys.platform != "linux":
        return None
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(theirs,))
    with _interrupts_ignored():
        process.start()
    theirs.close()
    try:
        ours.send((job, arguments))
        peak = ours.recv()
    except (EOFError, ConnectionError):
        return None
    finally:
        process.kill()
        process.join()
    if isinstance(peak, Exception):
        raise peak
    return peak


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start a process that never heeds Ctrl-C: its parent does, and kills it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(parent: Connection) -> None:
    job, arguments = parent.recv()
    try:
        before = _status_bytes("VmRSS")
        job(*arguments)
        parent.send(_status_bytes("VmHWM") - before)
    except Exception as error:
        parent.send(error)


def _status_bytes(name: str) -> int:
    # Not getrusage: its ru_maxrss starts from the peak of the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise KeyError(name)
