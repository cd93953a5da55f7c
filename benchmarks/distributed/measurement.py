"""Every method of an engine over every link: a Row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.common.agreement import Verdict
from benchmarks.common.rows import Row

from .methods import ENGINES, Method
from .network import Link, network
from .ranks import Ranks, ranks


def measure(
    model: str, chosen: Sequence[Method], links: Sequence[Link], rounds: int | None, say: Callable[[str], None]
) -> list[Row]:
    """Measure on two ranks, rank 0's seconds and bytes.

    Raises:
        CommandError: where there can be no such network.
    """
    rows: list[Row] = []
    with network() as net, ranks(net, model) as both:
        for engine in ENGINES:
            names = [one.name for one in chosen if one.engine == engine]
            if not names:
                continue
            say(f"{engine}: {len(names)} methods")
            net.limit(Link("unlimited", None, 0))
            both.tell({"engine": engine, "methods": names})
            for link in links:
                net.limit(link)
                number = rounds or link.rounds
                say(f"{engine}, {link.name}: {number} rounds")
                rows += _rows(both, engine, link, names, number)
    return rows


def _rows(both: Ranks, engine: str, link: Link, names: Sequence[str], rounds: int) -> list[Row]:
    answers = both.tell({"rounds": rounds})
    rows = []
    for name in names:
        ours = answers[0][name]
        row = Row(link.name, name, engine, ours["seconds"], next((a[name]["failure"] for a in answers), None))
        if row.failure is None:
            row.facts = {key: ours[key] for key in ("sent_bytes", "target_bytes")}
            if ours["matches"] is not None:
                equal = all(answer[name]["matches"] for answer in answers)
                row.matches = None
                row.judge(Verdict(0.0 if equal else float("inf"), "weights after the same steps"))
        rows.append(row)
    return rows
