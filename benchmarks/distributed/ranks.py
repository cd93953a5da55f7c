"""The two ranks as processes, each in its namespace, and what they are told and answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.common.errors import CommandError

from .network import ADDRESSES, Network

ROOT = Path(__file__).parents[2]


class Ranks:
    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def tell(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        """Give every rank the same task, and wait for what each answers."""
        for process in self._processes:
            stream = _stream(process.stdin)
            stream.write(json.dumps(task) + "\n")
            stream.flush()
        lines = [_stream(process.stdout).readline() for process in self._processes]
        if not all(lines):
            raise CommandError("a rank has ended; what it said is above")
        return [json.loads(line) for line in lines]


@contextmanager
def ranks(network: Network, model: str) -> Iterator[Ranks]:
    """Start a rank at each end of the network, one thread each, and end them."""
    processes = []
    try:
        for rank, interface in enumerate(network.interfaces):
            python = [sys.executable, "-m", "benchmarks.distributed.rank", str(rank), interface, model]
            # Large tensors on huge pages: page faults of gradients would be a noise of 10 %, as in benchmarks.step.
            settings = {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
            processes.append(
                subprocess.Popen(
                    [*network.command(rank), *python],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **settings},
                    cwd=ROOT,
                )
            )
        assert len(processes) == len(ADDRESSES)
        yield Ranks(processes)
        for process in processes:
            _stream(process.stdin).close()
        for process in processes:
            process.wait(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
