"""Where a weight and its target lay at a moment, and which values they had then."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import _extension


class PythonSnapshot:
    """The reference of ``_C.Snapshot``, which takes its place where the extension was built."""

    def __init__(self, weight: Tensor | None, target: Tensor | None) -> None:
        self._places = _place(weight), _place(target)
        # An address alone proves nothing: .bfloat16() and .float() in a row may end where they began. While a storage
        # is weakly referred to, no other one gets its identity.
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in (weight, target) if t is not None]
        self._versions: tuple[int | None, int | None] | None = None

    def note_values(self, weight: Tensor | None, target: Tensor | None) -> None:
        """Those that they have now, by autograd's version counters."""
        self._versions = _version(weight), _version(target)

    def is_place_of(self, weight: Tensor | None, target: Tensor | None) -> bool:
        """Whether these lie there, in the same storages, with that dtype and that shape."""
        return self._places == (_place(weight), _place(target))

    def has_values_of(self, weight: Tensor | None, target: Tensor | None) -> bool:
        """Whether these, which lie there, have the values that were noted last."""
        return self._versions == (_version(weight), _version(target))


def snapshot(weight: Tensor | None, target: Tensor | None) -> Any:
    """Of these as they lie now, in C++ where the extension was built."""
    return _implementation()(weight, target)


@functools.cache
def _implementation() -> Any:
    compiled = _extension.load()[0]  # here, since to import the package loads no extension
    return PythonSnapshot if compiled is None else compiled.Snapshot


def _place(tensor: Tensor | None) -> tuple[int, int, torch.dtype, torch.Size] | None:
    if tensor is None:
        return None
    return tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.dtype, tensor.shape


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version
