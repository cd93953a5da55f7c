"""One mask per optimizer step for a whole model, mixed in one launch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..gradient_masks import GradientMasks, gradient_masks_of
from ..modules import MixedLayer
from ..pieces import is_distributed
from . import host_memory, ranks
from .backward import EndOfBackward
from .following import follow, followers
from .layers import LayerDraw, full_names
from .phi import MixedAhead, Phi
from .seeds import Seeds, is_64_bits
from .shards import Shards, needs_pieces
from .siblings import SAME_INPUT, SharedInput, groups_of
from .slot import Slot
from .steps import Steps


class MixSampler:
    """Draws the masks of all mixout layers of a model at once, for one optimizer step or several.

    Without a sampler every forward draws anew, as dropout does. With one,

    - all micro-batches of a gradient accumulation share the masks of their step (paper, eq. 2: one mask per step);
    - the mixed weights Phi of all layers are written in one launch after each optimizer step, in the compute dtype, and
      both forward and backward use them: under autocast this replaces autocast's own cast of w (see ``premix``);
    - layers that read the same activation (query, key, value) share a neuron mask, which is closer to eq. 8 of the
      paper, where a dropped neuron loses all its outgoing weights; x[:, kept] is then saved once for all of them.

    **Masks.** Those of the k-th step are a function of (seed, k) and of each layer's name in ``model``: the Philox key
    is a hash of the three. Layers that share a mask have all their names in it, so that query's masks are others where
    key is not mixed, or has another p. ``state_dict`` holds the seed and the number of optimizer steps, and a resumed
    run continues with the same masks bit for bit: give the sampler to ``accelerator.register_for_checkpointing``, or
    :class:`mixout_kernels.MixSamplerCallback` to transformers' Trainer. All forwards between two steps have one mask:
    so have the two views of a contrastive or consistency loss (SimCSE, R-Drop) and Monte-Carlo passes. Where they are
    to differ, make no sampler, or call :meth:`advance` between them with backward before it.

    **Steps.** The sampler follows every ``torch.optim`` optimizer that holds one of the mixed weights: Trainer,
    accelerate and GradScaler need no callback, a step that GradScaler skips draws no new masks, nor does the one by
    which ``torch.distributed.checkpoint`` fills an optimizer's state. Several optimizers that hold a part of the
    weights each, one for each Parameter within backward say, count one step in each round; one within the step of
    another (SAM, Lookahead) counts with it. Where none holds a mixed weight (DeepSpeed ZeRO, fp32 master copies, a loop
    of your own) call :meth:`advance` after each update: a warning says so. Compiled code uses the sampler's masks, but
    mixes in each forward and backward.

    Args:
        model: after :func:`mixout_kernels.apply_mixout`.
        every: optimizer steps between two draws. 1 is mixout, k > 1 the resample period of GMixout (arXiv 2510.06982),
            ``math.inf`` a fixed random mask.
        share_masks: groups of attribute names; the layers of one parent module with these names share one neuron mask
            if their p, grad_p and in_features agree. ``()`` gives every layer its own.
        premix: keep Phi of every layer between steps. Costs ``extra_bytes``, the bytes of the mixed weights in the
            compute dtype; False mixes in each forward and backward. None premixes where that is the faster way: not
            where the CPU's fused GEMM mixes at no measurable cost (float32 on AMD's CPUs). An edit of a weight is
            noticed by autograd's version counter, so one through ``.data`` is not: call :meth:`advance` after it.
        host_targets: keep the targets in host memory, and copy them to a GPU in pieces while Phi is mixed, one piece
            ahead. Saves their bytes on the GPU but for two pieces (each of 64 MiB, or one larger target), and costs a
            transfer of them in each optimizer step; it goes with ``premix``. A layer that mixes by itself all the same
            (p = 1, compiled code) copies its own target in each forward. Give the model its dtype before: ``.to`` does
            not reach them.
        seed: of the masks, an int; None draws it from torch's default generator.
        same_on_all_ranks: under torch.distributed, take the seed of the group's first process on every rank; False
            gives each rank its own.
        process_group: whose processes agree on the seed and compare their targets here; all of them must make a
            sampler, or the others wait. None is every process. For pipeline or tensor parallelism: the ranks that hold
            the same layers.
        prefix: put before the names of the layers. Stages of a pipeline that are numbered from 0 each need one, unless
            they are to share masks.
        kept_all_gather: under FSDP2, leave targets whole on every rank and gather the kept columns of Phi alone: fewer
            bytes on the wire, for slow networks. Layers with uneven shards are gathered whole.

    **Sharded models.** Made after ``fully_shard``, a sampler shards the targets as the weights are. Each rank mixes its
    own rows, FSDP gathers Phi in the compute dtype in place of the weight, and reduces the kept columns of gradients
    alone (torch 2.9 and later). Between forward and backward ``layer.weight`` is then Phi. Made before, or with
    ``same_on_all_ranks=False`` or ``host_targets=True``, it leaves them whole; see
    :func:`mixout_kernels.shard_targets`.

    Raises:
        ValueError, TypeError: for a model without mixout, or one that has a sampler, or an argument that does not fit;
            on every rank, naming the layer, where ranks hold different targets of it.
        NotImplementedError: for a sharded model whose Phi cannot be made of pieces: ``reshard_after_forward`` an int,
            ``CPUOffloadPolicy`` on a GPU, a tensor-parallel plan other than colwise and rowwise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: float = 1,
        share_masks: Iterable[Sequence[str]] = SAME_INPUT,
        premix: bool | None = None,
        host_targets: bool = False,
        seed: int | None = None,
        same_on_all_ranks: bool = True,
        process_group: dist.ProcessGroup | None = None,
        prefix: str = "",
        kept_all_gather: bool = False,
    ) -> None:
        _check_arguments(model, every, premix, host_targets, seed)
        checks.flag("MixSampler", "kept_all_gather", kept_all_gather)
        checks.string("MixSampler", "prefix", prefix)
        layers = full_names(model, prefix)
        if any(layer.slot is not None for layer in layers.values()):
            raise ValueError("MixSampler: model: expected one without a sampler; call remove() on the one it has")
        _check_targets(layers)
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64).item())
        seed = ranks.agree(seed, layers, process_group, same_on_all_ranks)  # also without layers: others wait for it
        masks = gradient_masks_of(model)
        if not layers and masks is None:
            raise ValueError(
                "MixSampler: model: expected one with mixout layers or graddrop; call apply_mixout(model, p=...) first"
            )
        groups = groups_of(layers, share_masks)
        self.same_on_all_ranks = same_on_all_ranks
        names, numbers = _names_of_masks(groups, layers, masks, prefix)
        self._seeds = Seeds(seed, every, names)
        self._steps = Steps(list(layers.values()), tuple if masks is None else masks.parameters)
        in_order = [(name, number) for number, names in enumerate(groups) for name in names]
        phis = [Phi(layers[name], LayerDraw(layers[name], self._seeds, number)) for name, number in in_order]
        # Steps taken within a backward: seeds and Phi must stay until it has ended.
        self._pending: int | Tensor | None = None
        self._backward = EndOfBackward(self._settle)
        self._ahead = MixedAhead(phis, self._seeds, True if host_targets else premix, host_targets)
        shared = [SharedInput(len(names)) for names in groups]
        self._slots = [
            Slot(self, phi, self._ahead, shared[phi.draw.mask], self._seeds, self._steps, self._backward)
            for phi in phis
        ]
        if host_targets:
            host_memory.to_host(list(layers.values()))
        for slot in self._slots:
            slot.layer.slot = slot
        self._model = weakref.ref(model)  # which holds its sampler
        self._masks = masks
        if masks is not None:
            masks.bind(self, self._seeds, numbers)
        self._named_slots = {name: slot for (name, _), slot in zip(in_order, self._slots, strict=True)}
        self._group, self.kept_all_gather = process_group, kept_all_gather
        self.shards: Shards | None = None
        if any(is_distributed(tensor) for layer in layers.values() for tensor in (layer.weight, layer.target)):
            try:
                self.shard(model)
            except Exception:
                self.remove()
                raise
        follow(self)

    def __repr__(self) -> str:
        return (
            f"MixSampler({len(self._slots)} layers, {len(self._seeds.names)} masks, every={self.every}, "
            f"premix={self.premix}, host_targets={self.host_targets}, same_on_all_ranks={self.same_on_all_ranks}, "
            f"kept_all_gather={self.kept_all_gather}, {self.state_dict()})"
        )

    @property
    def every(self) -> float:
        """Optimizer steps between two draws."""
        return self._seeds.every

    @property
    def premix(self) -> bool | None:
        """Whether Phi is kept between steps; None where it pays."""
        return self._ahead.wanted

    @property
    def host_targets(self) -> bool:
        """Whether the targets are in host memory."""
        return self._ahead.host_targets

    @property
    def step(self) -> int:
        """Optimizer steps so far (reads the device)."""
        return self._seeds.step

    @property
    def model(self) -> nn.Module | None:
        """The model that it was made for; None once nobody else holds it."""
        return self._model()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The places of its layers."""
        return tuple(self._slots)

    @property
    def gradient_masks(self) -> GradientMasks | None:
        """What apply_graddrop masks outside of layers, while it draws by this sampler."""
        return self._masks if self._masks is not None and self._masks.sampler is self else None

    @property
    def draws(self) -> int:
        """How often keys were drawn: what hangs on a mask must not outlive a draw."""
        return self._seeds.draws

    @property
    def extra_bytes(self) -> int:
        """Bytes of the mixed weights that this sampler holds."""
        return self._ahead.nbytes

    def state_dict(self) -> dict[str, int]:
        """What the present masks, and all that follow, are made from: the seed, and the optimizer steps so far."""
        return {"seed": self._seeds.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on with the masks of the sampler that ``state`` is from: same model, ``every`` and ``share_masks``."""
        if not isinstance(state, dict) or set(state) != {"seed", "step"}:
            raise ValueError(f"MixSampler.load_state_dict: state: expected the keys seed and step, got {state!r}")
        if not (is_64_bits(state["seed"]) and is_64_bits(state["step"]) and state["step"] >= 0):
            raise ValueError(f"MixSampler.load_state_dict: state: expected two 64-bit ints, step >= 0, got {state!r}")
        self._seeds.restart(state["seed"], state["step"])
        self._ahead.refresh()

    def shard(self, model: nn.Module) -> None:
        """Puts each target where its weight lies; called by the constructor, and by ``shard_targets``."""
        if self.shards is not None:
            self.shards.take_out()
            self.shards = None
        if self.same_on_all_ranks and not self.host_targets:
            self.shards = Shards(model, self._named_slots, self, self.kept_all_gather, self._group)
        elif needs_pieces(model, [slot.layer for slot in self._slots]):
            raise ValueError(
                "MixSampler: model: expected whole targets, and no tensor parallelism, with same_on_all_ranks=False or "
                "host_targets=True: a piece of a weight is mixed on its own rank, by the mask of all"
            )

    def remove(self) -> None:
        """Takes the sampler out of the model: every forward draws anew.

        Targets that it sharded are gathered, for which every rank must call this.
        """
        followers.discard(self)
        if self.shards is not None:
            self.shards.take_out()
            self.shards.make_targets_whole()
            self.shards = None
        # After remove_mixout, which has called this, the layers are plain ones.
        present = [slot for slot in self._slots if getattr(slot.layer, "slot", None) is slot]
        for slot in present:
            slot.layer.slot = None
        if self._masks is not None:
            self._masks.unbind(self)
        if self.host_targets:
            host_memory.to_device([slot.layer for slot in present])

    def advance(self, steps: int | Tensor = 1) -> None:
        """Counts ``steps`` optimizer steps and mixes anew from the weights as they are.

        ``torch.optim`` optimizers that hold a mixed weight do this by themselves.
        """
        if not isinstance(steps, Tensor) and not (is_64_bits(steps) and steps >= 0):
            raise ValueError(f"MixSampler.advance: steps: expected an int >= 0, got {steps!r}")
        self._steps.seen = True
        self._seeds.advance(steps)
        self._ahead.refresh()

    def before_step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """Called by every optimizer."""
        self._steps.before(optimizer, parameters)
        if self._masks is not None:
            self._masks.let_go_of_blocks(parameters)

    def after_step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """Called by every optimizer."""
        if (steps := self._steps.after(optimizer, parameters)) is None:
            return
        self._pending = steps if self._pending is None else self._pending + steps
        if not self._backward.wait():
            self._settle()

    def _settle(self) -> None:
        """Draws and mixes for the steps that were taken."""
        steps, self._pending = self._pending, None
        if isinstance(steps, Tensor) or steps:
            self.advance(steps)
        elif steps is not None:
            self._ahead.refresh()  # the weights have changed, not the step


def _check_arguments(model: nn.Module, every: float, premix: bool | None, host_targets: bool, seed: int | None) -> None:
    if every != math.inf and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"MixSampler: every: expected an int >= 1 or math.inf, got {every!r}")
    checks.module("MixSampler", model)
    if premix not in (None, True, False):
        raise ValueError(f"MixSampler: premix: expected True, False or None, got {premix!r}")
    if not isinstance(host_targets, bool):
        raise ValueError(f"MixSampler: host_targets: expected True or False, got {host_targets!r}")
    if host_targets and premix is False:
        raise ValueError("MixSampler: host_targets: expected False with premix=False: every call needs its target")
    if seed is not None and not is_64_bits(seed):
        raise ValueError(f"MixSampler: seed: expected an int of 64 bits or None, got {seed!r}")


def _check_targets(layers: Mapping[str, MixedLayer]) -> None:
    for name, layer in layers.items():
        try:
            layer.check_target(layer._parameters.get("weight"))
        except ValueError as error:
            raise ValueError(f"MixSampler: model: {name}: {error}") from None


def _names_of_masks(
    groups: list[list[str]], layers: Mapping[str, MixedLayer], masks: GradientMasks | None, prefix: str
) -> tuple[list[str], dict[str, int]]:
    """What the masks are hashed from: the names of the layers that share one, and of what graddrop masks beside them,
    and the numbers of the latter by the names that it gives them.
    """
    names, numbers = [], {}
    for number, group in enumerate(groups):
        block = layers[group[0]].block
        names.append("+".join(group) if block is None else prefix + block)
        if block is not None:
            numbers[block] = number
    for name in () if masks is None else masks.names():
        if name not in numbers:
            numbers[name] = len(names)
            names.append(prefix + name)
    return names, numbers
