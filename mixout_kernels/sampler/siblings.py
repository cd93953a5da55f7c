"""Layers that read the same activation: they share a mask, the cast of their input and x[:, kept]."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..draws import Draw, shares_columns, strides_of
from ..modules import MixedLayer

# Linear layers that read the same activation, by their attribute names: BERT and ViT; Llama, BART and OPT; Llama's
# gated MLP; DistilBERT; T5 and its gated MLP. (GPT-2's attention is one Conv1D already.)
SAME_INPUT = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)


def groups_of(layers: Mapping[str, MixedLayer], share_masks: Iterable[Sequence[str]]) -> list[list[str]]:
    """The layers of each mask, by name: siblings whose masks can be one, and every other layer for itself."""
    if isinstance(share_masks, str):
        raise TypeError(f"MixSampler: share_masks: expected groups of names, got the string {share_masks!r}")
    together = {}
    for k, names in enumerate(share_masks):
        if isinstance(names, str):
            raise TypeError(f"MixSampler: share_masks: expected groups of names, got the string {names!r}")
        together.update(dict.fromkeys(names, k))
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        weight = layer.matrix(layer.weight)
        key: Any = name if layer.block is None else ("block", layer.block)
        if attribute in together and shares_columns(strides_of(layer.mask, weight.shape)):
            key = parent, together[attribute], layer.p, layer.grad_p, weight.shape[1]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


class SharedInput:
    """What the first of some siblings made of their input, for the others.

    The cast hangs on the input and the compute dtype; x[:, kept] also on the draw and on q, which may differ between
    siblings whose settings were changed since: these then do not share it. Both are held until each sibling has been
    called, with this input or another one (cross-attention), or the input is gone.
    """

    def __init__(self, siblings: int) -> None:
        self.siblings = siblings
        self.input: weakref.ref[Tensor] | None = None
        self.cast: Tensor | None = None  # None: the input itself
        self.kept: Tensor | None = None
        self._input_key: tuple[Any, ...] = ()
        self._kept_key: tuple[Any, ...] = ()
        self._called: set[int] = set()

    def made_of(
        self, input: Tensor, dtype: torch.dtype, draw: Draw, q: float, number: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The cast of this input and its x[:, kept] by this draw, the ``number``-th of its seed, as far as a sibling
        has made them.
        """
        if self.input is None or self.input() is not input or self._input_key != _input_key(input, dtype):
            return None, None
        # The same object, unchanged since, to be cast alike.
        kept = self.kept if self._kept_key == _kept_key(draw, q, number) else None
        return input if self.cast is None else self.cast, kept

    def put(
        self, input: Tensor, dtype: torch.dtype, cast: Tensor, kept: Tensor, draw: Draw, q: float, number: int
    ) -> None:
        self.input = weakref.ref(input, self.clear)
        self.cast = None if cast is input else cast
        self.kept = kept
        self._input_key, self._kept_key = _input_key(input, dtype), _kept_key(draw, q, number)

    def called_by(self, sibling: object) -> None:
        if id(sibling) in self._called:  # not all were called in the last round
            self._called.clear()
        self._called.add(id(sibling))
        if len(self._called) == self.siblings:
            self._called.clear()
            self.clear()

    def clear(self, reference: weakref.ref[Tensor] | None = None) -> None:
        if reference is None or reference is self.input:
            self.input = self.cast = self.kept = None


def _input_key(input: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return input._version, input.requires_grad, dtype, torch.is_grad_enabled()


def _kept_key(draw: Draw, q: float, number: int) -> tuple[Any, ...]:
    # The seed is written anew for every draw: its address names the mask, the number which of its draws it is.
    return draw.seed.data_ptr(), number, q, draw.strides, draw.offset
