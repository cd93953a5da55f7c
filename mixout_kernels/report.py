"""What ``apply_mixout`` did, as a table and as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

from .modules import MixedLayer
from .names import unwrapped


class Row(NamedTuple):
    """What happened to one module or Parameter."""

    what: Literal["mixed", "skipped", "dropout", "goes on", "slow"]
    name: str
    detail: str
    p: float | None = None  # of a mixed layer


@dataclass
class Report:
    """What :func:`mixout_kernels.apply_mixout` did: ``str(report)`` is a table, ``report.rows()`` the same as data.

    Every linear layer, and every other Parameter of two dimensions or more, is in ``mixed`` or, with the reason, in
    ``skipped``; every dropout in ``dropout`` if it was set to 0, or in ``dropout_left`` if it goes on.

    Attributes:
        p, mask: as they were given.
        mixed: name of each mixed layer, and its class, shape and p.
        skipped: name of what is not mixed, and why.
        dropout: name of each module with a dropout rate, and the rate that was set to 0.
        dropout_left: name of each module whose dropout goes on, and why.
        rates: name of each mixed layer, and its p.
        target_bytes: of all targets together.
        slow: name of each module ("" for the model) that may now run slowly, why, and the remedy.
    """

    p: float | Mapping[str, float]
    mask: str
    mixed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dropout: dict[str, str] = field(default_factory=dict)
    dropout_left: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    target_bytes: int = 0
    slow: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """One row for each module or Parameter, in the order of the table."""
        return [
            *(Row("mixed", name, detail, self.rates[name]) for name, detail in self.mixed.items()),
            *(Row("skipped", name, reason) for name, reason in self.skipped.items()),
            *(Row("dropout", name, rates) for name, rates in self.dropout.items()),
            *(Row("goes on", name, why) for name, why in self.dropout_left.items()),
            *(Row("slow", name, why) for name, why in self.slow.items()),
        ]

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError that names the layers which were mixed once and are no longer.

        What replaces modules after ``apply_mixout`` takes mixout out again without a word:
        ``resize_token_embeddings`` does so with an output layer, or replaces the weight of a tied one, which its target
        does not fit then. The model may be wrapped by now (torch.compile, DDP).
        """
        named = model.named_modules(remove_duplicate=False)
        mixed = {
            unwrapped(name)
            for name, m in named
            if isinstance(m, MixedLayer) and m.target_fits(m._parameters.get("weight"))
        }
        lost = [name for name in self.mixed if unwrapped(name) not in mixed]
        if lost:
            raise ValueError(
                f"Report.check: model: expected its {len(self.mixed)} mixed layers, got {len(lost)} that are mixed no "
                f"longer: {', '.join(lost[:8])}; call remove_mixout(model) and apply_mixout once more"
            )

    def __str__(self) -> str:
        rows = self.rows()
        width = max((len(row.name) for row in rows), default=0)
        lines = [f"{row.what:8} {row.name or '(the model)':{width}}  {row.detail}" for row in rows]
        head = (
            f"mixout p={self.p}, mask={self.mask!r}: {len(self.mixed)} mixed, {len(self.skipped)} skipped, "
            f"{len(self.dropout)} dropout rates set to 0, {self.target_bytes / 2**20:.1f} MiB of frozen targets"
        )
        return "\n".join([head, *lines])
