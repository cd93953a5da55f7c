"""A saved run, read from pytest-benchmark's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAR, DROPOUT = "linear", "dropout-p0.1"  # the layers that ratios are taken to


@dataclass(frozen=True)
class Entry:
    case: str
    variant: str
    mode: str
    seconds: float  # median
    quartiles: tuple[float, float]
    rounds: int
    info: dict[str, Any]

    @property
    def wrong(self) -> bool:
        return self.info["matches_reference"] is False


@dataclass(frozen=True)
class Run:
    machine: dict[str, Any]  # conftest's: device, threads, versions, ceilings
    date: str
    commit: dict[str, Any]
    entries: dict[tuple[str, str, str], Entry]  # by case, variant and mode

    @classmethod
    def load(cls, path: Path) -> Run:
        try:
            document = json.loads(path.read_text())
            machine, benchmarks = document["machine_info"]["layers"], document["benchmarks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the JSON of python -m benchmarks.layers, got {error!r}") from error
        entries = {}
        for b in benchmarks:
            case, variant, mode = (b["params"][name] for name in ("case", "variant", "mode"))
            stats = b["stats"]
            entries[case, variant, mode] = Entry(
                case, variant, mode, stats["median"], (stats["q1"], stats["q3"]), stats["rounds"], b["extra_info"]
            )
        return cls(machine, document["datetime"], document["commit_info"], entries)

    @property
    def on_gpu(self) -> bool:
        return self.machine["device_type"] == "cuda"

    def cases(self) -> list[str]:
        return list(dict.fromkeys(case for case, _, _ in self.entries))

    def variants(self, case: str | None = None) -> list[str]:
        return list(dict.fromkeys(variant for c, variant, _ in self.entries if case in (None, c)))

    def ratio(self, case: str, variant: str, mode: str, baseline: str = LINEAR) -> float | None:
        """Of medians; None where one of them was not measured or does not match the reference."""
        ours, theirs = self.entries.get((case, variant, mode)), self.entries.get((case, baseline, mode))
        if ours is None or theirs is None or ours.wrong or theirs.wrong:
            return None
        return ours.seconds / theirs.seconds
