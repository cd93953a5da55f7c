"""Two network namespaces joined by a cable of a chosen speed, for one process each; the interface counts the bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.errors import CommandError

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Link:
    name: str
    rate: str | None  # in tc's words
    rounds: int  # a slow link needs fewer: its times hardly scatter


LINKS = (Link("1 Gbit/s", "1gbit", 7), Link("200 Mbit/s", "200mbit", 3), Link("unlimited", None, 9))


class Network:
    """The two ends of a veth pair, each in a namespace of this process's own."""

    def __init__(self) -> None:
        self.namespaces = tuple(f"mixout-{os.getpid()}-{side}" for side in "ab")
        self.interfaces = ("mixout-a", "mixout-b")

    def command(self, rank: int) -> list[str]:
        """What to put before a command that runs at this end."""
        return ["ip", "netns", "exec", self.namespaces[rank]]

    def limit(self, link: Link) -> None:
        """Shape what both ends send by a token bucket, or let it go."""
        for rank, interface in enumerate(self.interfaces):
            tc = [*self.command(rank), "tc", "qdisc"]
            subprocess.run([*tc, "del", "dev", interface, "root"], capture_output=True)
            if link.rate is not None:
                bucket = ["rate", link.rate, "burst", "512kb", "latency", "100ms"]
                _run([*tc, "add", "dev", interface, "root", "tbf", *bucket])

    def up(self) -> None:
        for namespace in self.namespaces:
            _run(["ip", "netns", "add", namespace])
        (a, b), (left, right) = self.namespaces, self.interfaces
        _run(["ip", "link", "add", left, "netns", a, "type", "veth", "peer", "name", right, "netns", b])
        for rank, (interface, address) in enumerate(zip(self.interfaces, ADDRESSES, strict=True)):
            ip = [*self.command(rank), "ip"]
            _run([*ip, "addr", "add", f"{address}/24", "dev", interface])
            _run([*ip, "link", "set", interface, "up"])
            _run([*ip, "link", "set", "lo", "up"])

    def down(self) -> None:
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


@contextmanager
def network() -> Iterator[Network]:
    """Set the two namespaces up and take them down again.

    Raises:
        CommandError: that says what is missing here.
    """
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise CommandError(f"no {program}: network namespaces need iproute2")
    if os.geteuid() != 0:
        raise CommandError("not root: only root makes network namespaces")
    made = Network()
    # Ended by another process it must take the namespaces along, as it does on Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        made.up()
        yield made
    finally:
        made.down()
        signal.signal(signal.SIGTERM, before)


def sent_bytes(interface: str) -> int:
    """Count what this interface, of the namespace of this process, has sent so far."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CommandError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
