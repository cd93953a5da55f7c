"""DistributedDataParallel: a communication hook that reduces the kept part of each gradient alone."""
# No annotations as strings here: DDP compares those of a hook with classes.

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from ..sampler import MixSampler
from .kept import Kept, KeptParts

Hook = Callable[[Any, GradBucket], Future[Tensor]]


class KeptColumns:
    r"""The state of :func:`kept_columns_hook`, which sends less of each gradient under DistributedDataParallel.

    .. code-block:: python

        sampler = mk.MixSampler(model)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(mk.KeptColumns(sampler), mk.kept_columns_hook)

    All ranks have the same masks, so the gradient of a mixed weight is zero in the same columns everywhere. Of each
    bucket the kept columns, and everything that has no mask, are packed into one buffer, which ``inner`` reduces, and
    put back. For two ranks every gradient is that of DDP without the hook, bit for bit; for more, within the order in
    which the ranks' terms are added.

    What is packed: the kept columns of a weight ``[out, in]`` with ``mask="neuron"`` (the rows of a ``Conv1D``), the
    kept rows with ``"output"``; with ``"layer"``, and in a block of apply_graddrop that is off, nothing. The same goes
    for the gradients that apply_graddrop masks outside of layers. What travels whole: with ``"weight"``, and where a
    fixed mask was given; a weight that something else than a mixed layer holds too (a tied embedding), or layers with
    different masks; in a step in which the mask was changed between two accumulated backward passes, or in which a
    layer was in eval mode. ``print(state)`` lists them. Each DDP needs a state of its own.

    On a GPU the shapes must not hang on the draw: as many columns are sent as the kernels reserve for them (the mean
    and seven standard deviations), nothing is read back by the host, and only ``"neuron"`` masks of layers are packed.

    Args:
        sampler: of the model under DDP, with the same masks on all ranks.
        inner: the hook that reduces the packed buffer: torch's ``allreduce_hook``, ``fp16_compress_hook``, or another
            one that reads ``bucket.buffer()`` alone. PowerSGD's reads single gradients.
        inner_state: its state: for torch's own the process group of DDP, None for every process.
        check: how many backward passes, from the first on, are checked: that all ranks have the same masks, and that
            what is not sent is zero. A pass that is checked waits for the other ranks at each bucket.

    Attributes:
        dense_bytes, sent_bytes: of all gradients that the hook was given, and of what ``inner`` got.

    Raises:
        ValueError, TypeError: for an argument that does not fit, a sampler with ``same_on_all_ranks=False`` among them.
        RuntimeError: in a checked backward, on every rank, naming the first parameter: if ranks have different masks of
            it, or if its gradient has entries that its mask drops. Those come from elsewhere than the layer: from a
            penalty on the weights in the loss, say. If they are the same on every rank, as a penalty's are, nothing is
            lost with ``check=0``.
    """

    def __init__(
        self,
        sampler: MixSampler,
        inner: Hook = allreduce_hook,
        inner_state: Any = None,
        check: int = 1,
    ) -> None:
        if not isinstance(sampler, MixSampler):
            raise TypeError(f"KeptColumns: sampler: expected a MixSampler, got {type(sampler).__name__}")
        if not sampler.same_on_all_ranks:
            raise ValueError(
                "KeptColumns: sampler: expected one with same_on_all_ranks=True, got False: where each rank has masks "
                "of its own, each drops other columns"
            )
        if not callable(inner):
            raise TypeError(f"KeptColumns: inner: expected a communication hook, got {type(inner).__name__}")
        if isinstance(check, bool) or not isinstance(check, int) or check < 0:
            raise ValueError(f"KeptColumns: check: expected an int >= 0, got {check!r}")
        self.sampler, self.inner, self.inner_state, self.check = sampler, inner, inner_state, check
        self.dense_bytes = self.sent_bytes = 0
        self._parts = KeptParts(sampler)
        self._rooms: dict[int, Tensor] = {}
        # Under which masks each gradient was made since it was last reduced.
        self._moments: dict[Tensor, set[Hashable]] = {}
        note = _Note(weakref.ref(self))  # a Parameter's hooks are no place to keep a sampler alive
        for parameter in self._parts.parameters:
            parameter.register_post_accumulate_grad_hook(note)

    def __repr__(self) -> str:
        sent = f"{self.sent_bytes / self.dense_bytes:.2f}" if self.dense_bytes else "nothing yet"
        return (
            f"KeptColumns({len(self._parts.parameters)} of {len(self._parts.names)} gradients are cut, "
            f"inner={getattr(self.inner, '__name__', self.inner)}, check={self.check}, sent/dense={sent})"
        )

    def __str__(self) -> str:
        """What is sent of each gradient that has a mask, in the present draw."""
        described = {name: self._parts.describe(parameter) for parameter, name in self._parts.names.items()}
        width = max(map(len, described))
        return "\n".join([repr(self), *(f"  {name:{width}}  {what}" for name, what in described.items() if what)])

    def note(self, parameter: Tensor) -> None:
        """A backward has added to this Parameter's gradient."""
        self._moments.setdefault(parameter, set()).add(self._parts.moment(parameter))

    def to_send(self, parameter: Tensor) -> Kept | None:
        """What the mask keeps of the gradient, None for all; called once for each gradient that is to be reduced."""
        moments = self._moments.pop(parameter, set())
        moment = self._parts.moment(parameter)
        return self._parts.of(parameter) if moments <= {moment} else None

    def room(self, bucket: int, size: int, like: Tensor) -> Tensor:
        """Memory for what is packed of this bucket, which stays: fresh memory costs page faults in every step."""
        room = self._rooms.get(bucket)
        if room is None or room.numel() < size or (room.dtype, room.device) != (like.dtype, like.device):
            room = self._rooms[bucket] = like.new_empty(size)
        return room[:size]

    def name_of(self, parameter: Tensor) -> str:
        return self._parts.names.get(parameter, "a parameter outside of the sampler's model")

    def mask_number(self, parameter: Tensor) -> int:
        """A number that is another one for another mask, on any rank (reads the device)."""
        draw = self._parts.draw(parameter)
        return 0 if draw is None else hash((*draw.seed.tolist(), *draw[1:]))


class _Note(NamedTuple):
    state: "weakref.ref[KeptColumns]"

    def __call__(self, parameter: Tensor) -> None:
        if (state := self.state()) is not None:
            state.note(parameter)


class _Piece(NamedTuple):
    """A gradient, and its place in the packed buffer."""

    gradient: Tensor
    kept: Kept | None
    start: int
    shape: list[int]

    def of(self, packed: Tensor) -> Tensor:
        size = torch.Size(self.shape).numel()
        return packed[self.start : self.start + size].view(self.shape)

    def pack(self, packed: Tensor) -> None:
        if self.kept is None:
            self.of(packed).copy_(self.gradient)
        else:
            torch.index_select(self.gradient, self.kept.axis, self.kept.index, out=self.of(packed))

    def unpack(self, packed: Tensor) -> None:
        if self.kept is None:
            self.gradient.copy_(self.of(packed))
        else:  # what was dropped is zero on every rank, so it is their mean already
            self.gradient.index_copy_(self.kept.axis, self.kept.index, self.of(packed))


def kept_columns_hook(state: KeptColumns, bucket: GradBucket) -> Future[Tensor]:
    """A communication hook for ``DistributedDataParallel.register_comm_hook``: see :class:`KeptColumns`."""
    if not isinstance(bucket, GradBucket):
        raise TypeError(
            f"kept_columns_hook: bucket: expected a torch.distributed.GradBucket, got {type(bucket).__name__}: DDP has "
            "none with torch._dynamo.config.optimize_ddp='python_reducer'"
        )
    buffer = bucket.buffer()
    pieces: list[_Piece] = []
    if not buffer.is_sparse:
        total = 0
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            kept = state.to_send(parameter)
            shape = list(parameter.shape) if kept is None else kept.shape_in(parameter)
            pieces.append(_Piece(gradient, kept, total, shape))
            total += torch.Size(shape).numel()
    if state.check > 0:
        _check(state, bucket, pieces)
        state.check -= bucket.is_last()
    state.dense_bytes += buffer.nbytes
    if all(piece.kept is None for piece in pieces):
        state.sent_bytes += buffer.nbytes
        return state.inner(state.inner_state, bucket)
    if total == 0:  # all of it is dropped; not every backend reduces nothing
        nothing: Future[Tensor] = Future()
        nothing.set_result(buffer)
        return nothing
    packed = state.room(bucket.index(), total, buffer)
    state.sent_bytes += packed.nbytes
    for piece in pieces:
        piece.pack(packed)
    bucket.set_buffer(packed)  # what the inner hook reads
    future = state.inner(state.inner_state, bucket)

    def unpack(future: Future[Any]) -> Tensor:
        value = future.value()
        reduced = value[0] if isinstance(value, list) else value
        for piece in pieces:
            piece.unpack(reduced.to(buffer.dtype))  # bf16_compress_wrapper returns its own dtype
        bucket.set_buffer(buffer)
        return buffer

    return future.then(unpack)


def _check(state: KeptColumns, bucket: GradBucket, pieces: list[_Piece]) -> None:
    """Compares between ranks, for each gradient of the bucket, the mask and how many entries it leaves behind."""
    parameters = bucket.parameters()[: len(pieces)]
    ours = []
    for parameter, (gradient, kept, *_) in zip(parameters, pieces, strict=True):
        if kept is None:
            ours.append((0, 0))
            continue
        lost = torch.count_nonzero(gradient) - torch.count_nonzero(gradient.index_select(kept.axis, kept.index))
        ours.append((state.mask_number(parameter), int(lost)))
    group = state.inner_state if isinstance(state.inner_state, dist.ProcessGroup) else None
    tensor = torch.tensor(ours, dtype=torch.int64, device=bucket.buffer().device).reshape(-1)
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor, group=group)
    ranks = torch.stack(everyone).view(len(everyone), -1, 2).tolist()
    for number, parameter in enumerate(parameters):
        name = state.name_of(parameter)
        masks, lost_entries = zip(*(rank[number] for rank in ranks), strict=True)
        if len(set(masks)) > 1:
            other = next(rank for rank, mask in enumerate(masks) if mask != masks[0])
            raise RuntimeError(
                f"KeptColumns: sampler: expected the same mask of {name!r} on every rank, got different ones on ranks "
                f"0 and {other}: give every rank the same seed, p and number of steps"
            )
        if any(lost_entries):
            rank = next(rank for rank, lost in enumerate(lost_entries) if lost)
            raise RuntimeError(
                f"KeptColumns: the gradient of {name!r}: expected zeros where its mask drops, got {lost_entries[rank]} "
                f"other entries on rank {rank}: something else than its layer adds to it, such as a penalty on the "
                "weights in the loss. If that is the same on every rank, pass check=0; else do without this hook"
            )
