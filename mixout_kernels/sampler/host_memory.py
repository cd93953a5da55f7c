"""Targets in host memory, brought to the device piece by piece while Phi is mixed from them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..modules import MixedLayer

# A piece's copy must take longer than starting it (10 us against a millisecond at 50 GB/s), and two pieces lie on the
# device at a time.
PIECE_BYTES = 64 * 2**20


def to_host(layers: Sequence[MixedLayer]) -> None:
    """Moves the targets of these layers, each once, to host memory that a GPU can read (pinned, where there is one).

    ``model.to`` leaves them where they are from then on.
    """
    moved: dict[int, Tensor] = {}
    for layer in layers:
        target = layer.target
        if target is not None and id(target) not in moved:
            # Not .cpu(): an expanded target would stay one, and its elements could not be copied one by one.
            host = torch.empty_like(target, device="cpu", pin_memory=torch.cuda.is_available())
            moved[id(target)] = host.copy_(target)
        layer.target = None if target is None else moved[id(target)]
        layer.host_target = True


def to_device(layers: Sequence[MixedLayer]) -> None:
    """Undoes :func:`to_host`: on the devices of their weights again, which they follow."""
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for layer in layers:
        if (target := layer.target) is not None:
            key = id(target), layer.weight.device
            if key not in moved:  # tied layers go on sharing one
                moved[key] = target.to(layer.weight.device)
            layer.target = moved[key]
        layer.host_target = False


def to_device_of(weight: Tensor, target: Tensor | None) -> Tensor | None:
    """The target on the weight's device: itself, or a copy."""
    return None if target is None else target.to(weight.device, non_blocking=True)


def pieces(targets: Sequence[Tensor | None]) -> list[slice]:
    """Runs of consecutive targets of at most ``PIECE_BYTES``, or of one larger target."""
    found, start, size = [], 0, 0
    for k, target in enumerate(targets):
        nbytes = 0 if target is None else _padded_bytes(target)
        if k > start and size + nbytes > PIECE_BYTES:
            found.append(slice(start, k))
            start, size = k, 0
        size += nbytes
    return [*found, slice(start, len(targets))]


def on_device(targets: Sequence[Sequence[Tensor | None]], device: torch.device) -> Iterator[list[Tensor | None]]:
    """Each piece's targets on the device, valid until the next piece is asked for, which is being copied meanwhile.

    Two buffers take turns. On a GPU a second stream fills one while the current stream reads the other; each waits for
    the other's events, never the host, so it can be captured in a CUDA graph.
    """
    size = max(sum(_padded_bytes(t) for t in piece if t is not None) for piece in targets)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(targets)))]
    streams = _Streams(device)

    def copy(k: int) -> list[Tensor | None]:
        with streams.copying(k % 2):
            return _copied(targets[k], buffers[k % 2])

    try:
        ahead = copy(0)
        for k in range(len(targets)):
            present = ahead
            streams.wait_for_copy(k % 2)
            if k + 1 < len(targets):
                ahead = copy(k + 1)
            yield present
            streams.has_read(k % 2)
    finally:
        streams.join()  # also if the mixing failed: the buffers' memory goes back to the current stream


class _Streams:
    """The order of copies and reads of the two buffers; on a CPU everything is in order already."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.current = torch.cuda.current_stream(device)
            self.side = _side_stream(device)
            self.side.wait_stream(self.current)  # the buffers' memory may still be in use there
            self.copied = [torch.cuda.Event(), torch.cuda.Event()]
            self.read: list[torch.cuda.Event | None] = [None, None]

    @contextlib.contextmanager
    def copying(self, buffer: int) -> Iterator[None]:
        if not self.on_gpu:
            yield
            return
        with torch.cuda.stream(self.side):
            if (read := self.read[buffer]) is not None:
                self.side.wait_event(read)
            yield
            self.copied[buffer].record(self.side)

    def wait_for_copy(self, buffer: int) -> None:
        if self.on_gpu:
            self.current.wait_event(self.copied[buffer])

    def has_read(self, buffer: int) -> None:
        if self.on_gpu:
            self.read[buffer] = self.current.record_event()

    def join(self) -> None:
        if self.on_gpu:
            self.current.wait_stream(self.side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: torch hands out new ones from a pool of 32, where they would soon meet a stream in use."""
    return torch.cuda.Stream(device)


def _copied(targets: Sequence[Tensor | None], buffer: Tensor) -> list[Tensor | None]:
    """Copies of the targets, one behind the other in ``buffer``."""
    copies: list[Tensor | None] = []
    offset = 0
    for target in targets:
        if target is None:
            copies.append(None)
            continue
        place = buffer[offset : offset + target.nbytes].view(target.dtype)
        # Strides as they are: a transposed target stays one.
        copies.append(place.as_strided(target.shape, target.stride()).copy_(target, non_blocking=True))
        offset += _padded_bytes(target)
    return copies


def _padded_bytes(target: Tensor) -> int:
    """Kernels load 16 bytes at a time; 512 is what torch's allocator aligns to."""
    return -(-target.nbytes // 512) * 512
