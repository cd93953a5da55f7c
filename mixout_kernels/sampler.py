"""One mask per optimizer step for a whole model, mixed in one launch."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import backends, host_memory
from .backends import MixedWeight
from .draws import Draw, GradientMask, strides_of
from .functional import compute_dtype, sampled_linear
from .modules import MixConv1D, MixLinear
from .targets import step_taken

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


class MixSampler:
    """Draws the masks of all mixout layers of a model at once, for one optimizer step or several.

    Without a sampler every forward draws anew, as dropout does. With one,

    - all micro-batches of a gradient accumulation share the masks of their step (paper, eq. 2: one mask per step);
    - the mixed weights Phi of all layers are written in one launch after each optimizer step, in the compute dtype, and
      both forward and backward use them: under autocast this replaces autocast's own cast of w (see ``premix``);
    - layers that read the same activation (query, key, value) share a neuron mask, which is closer to eq. 8 of the
      paper, where a dropped neuron loses all its outgoing weights; x[:, kept] is then saved once for all of them.

    The k-th mask is a function of (seed, k): ``state_dict`` holds the seed and the number of optimizer steps, and a
    resumed run continues with the same masks bit for bit. The sampler follows any ``torch.optim`` optimizer that holds
    one of the model's mixed weights by itself: Trainer, accelerate and GradScaler need no callback, and a step that
    GradScaler skips draws no new masks. Of several optimizers it counts the steps of the one that holds the first mixed
    weight; a loop without a ``torch.optim`` optimizer calls :meth:`advance` after its updates. Compiled code uses the
    sampler's masks, but mixes in each forward and backward.

    Args:
        model: after :func:`mixout_kernels.apply_mixout`.
        every: optimizer steps between two draws. 1 is mixout, k > 1 the resample period of GMixout (arXiv 2510.06982),
            ``math.inf`` a fixed random mask.
        share_masks: groups of attribute names; the layers of one parent module with these names share one neuron mask
            if their p and in_features agree. ``()`` gives every layer its own.
        premix: keep Phi of every layer between steps. Costs ``extra_bytes``, the bytes of the mixed weights in the
            compute dtype; False mixes in each forward and backward. None premixes where that is the faster way: not
            where the CPU's fused product mixes at no measurable cost. An edit of a weight is noticed by autograd's
            version counter, so one through ``.data`` is not: call :meth:`advance` after it.
        host_targets: keep the targets in host memory, and copy them to a GPU in pieces while Phi is mixed, one piece
            ahead. Saves their bytes on the GPU but for two pieces (each of 64 MiB, or one larger target), and costs a
            transfer of them in each optimizer step; it goes with ``premix``. A layer that mixes by itself all the same
            (p = 1, compiled code) copies its own target in each forward. Give the model its dtype before: ``.to`` does
            not reach them.
        seed: of the first mask, an int; None draws it from torch's default generator.
        same_on_all_ranks: under torch.distributed, take rank 0's seed on every rank; False gives each rank its own.

    Raises:
        ValueError, TypeError: for a model without mixout, or one that has a sampler, or an argument that does not fit.
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
    ) -> None:
        if every != math.inf and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"MixSampler: every: expected an int >= 1 or math.inf, got {every!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"MixSampler: model: expected an nn.Module, got {type(model).__name__}")
        layers = {name: m for name, m in model.named_modules() if isinstance(m, (MixLinear, MixConv1D))}
        if not layers:
            raise ValueError(
                "MixSampler: model: expected one with mixout layers; call apply_mixout(model, p=...) first"
            )
        if any(layer.slot is not None for layer in layers.values()):
            raise ValueError("MixSampler: model: expected one without a sampler; call remove() on the one it has")
        if premix not in (None, True, False):
            raise ValueError(f"MixSampler: premix: expected True, False or None, got {premix!r}")
        if not isinstance(host_targets, bool):
            raise ValueError(f"MixSampler: host_targets: expected True or False, got {host_targets!r}")
        if host_targets and premix is False:
            raise ValueError("MixSampler: host_targets: expected False with premix=False: every call needs its target")
        groups = _groups(layers, share_masks)
        self.every = every
        self.premix = True if host_targets else premix
        self.host_targets = host_targets
        self._warned = False
        # Optimizer steps counted, and how many that were when a step of this optimizer began. Not `draws`: a hook of
        # the user's may call advance() within a step.
        self._counts = 0
        self._counts_before: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.draws = 0  # how often seeds were drawn, for what must not outlive a draw
        self._base = _base_seed(seed, same_on_all_ranks)
        self._masks = 1 + max(groups.values())
        self._counters: dict[torch.device, _Counter] = {}
        shared = {number: _SharedInput(list(groups.values()).count(number)) for number in set(groups.values())}
        self._slots = [_Slot(self, layer, groups[name], shared[groups[name]]) for name, layer in layers.items()]
        for slot in self._slots:
            self.place(slot)
        if host_targets:
            host_memory.to_host(list(layers.values()))
        for slot in self._slots:
            slot.layer.slot = slot
        _follow_optimizers()
        _alive.add(self)

    def __repr__(self) -> str:
        return (
            f"MixSampler({len(self._slots)} layers, {self._masks} masks, every={self.every}, "
            f"premix={self.premix}, host_targets={self.host_targets}, {self.state_dict()})"
        )

    @property
    def step(self) -> int:
        """Optimizer steps so far (reads the device)."""
        return int(next(iter(self._counters.values())).step.item())

    @property
    def extra_bytes(self) -> int:
        """Bytes of the mixed weights that this sampler holds."""
        return sum(slot.mixed.nbytes for slot in self._slots if slot.mixed is not None)

    def state_dict(self) -> dict[str, int]:
        """What the present masks, and all that follow, are made from: the seed, and the optimizer steps so far."""
        return {"seed": self._base, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on with the masks of the sampler that ``state`` is from: same model, ``every`` and ``share_masks``."""
        if not isinstance(state, dict) or set(state) != {"seed", "step"}:
            raise ValueError(f"MixSampler.load_state_dict: state: expected the keys seed and step, got {state!r}")
        if not (_is_64_bits(state["seed"]) and _is_64_bits(state["step"]) and state["step"] >= 0):
            raise ValueError(f"MixSampler.load_state_dict: state: expected two 64-bit ints, step >= 0, got {state!r}")
        self._base = state["seed"]
        for counter in self._counters.values():
            counter.step.fill_(state["step"])
        self._draw()
        self.mix(self._slots)

    def remove(self) -> None:
        """Takes the sampler out of the model: every forward draws anew."""
        _alive.discard(self)
        present = [slot for slot in self._slots if slot.layer.slot is slot]
        for slot in present:
            slot.layer.slot = None
        if self.host_targets:
            host_memory.to_device([slot.layer for slot in present])

    def advance(self, steps: int | Tensor = 1) -> None:
        """Counts ``steps`` optimizer steps and mixes anew; ``torch.optim`` optimizers do this by themselves."""
        if not isinstance(steps, Tensor) and not (_is_64_bits(steps) and steps >= 0):
            raise ValueError(f"MixSampler.advance: steps: expected an int >= 0, got {steps!r}")
        for device, counter in self._counters.items():
            counter.step.add_(steps.to(device) if isinstance(steps, Tensor) else steps)
        self._draw()
        self.mix(self._slots)

    def _before_step(self, optimizer: Optimizer) -> None:
        self._counts_before[optimizer] = self._counts

    def _after_step(self, optimizer: Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        weights = [slot.layer.weight for slot in self._slots]
        first = next((w for w in weights if isinstance(w, nn.Parameter) and w.requires_grad), weights[0])
        # An optimizer may step another one that holds the weights (ZeRO's, SAM, Lookahead): that is one step.
        counted = self._counts_before.pop(optimizer, self._counts) != self._counts
        if id(first) in held and not counted:
            self._counts += 1
            self.advance(step_taken(optimizer))
        elif any(id(weight) in held for weight in weights):
            self.mix(self._slots)  # the weights have changed, not the step
        elif not isinstance(first, nn.Parameter) and not self._warned:
            self._warned = True
            warnings.warn(
                "MixSampler: an optimizer took a step, but the weights of the mixed layers are no Parameters that it "
                "could hold (FSDP with use_orig_params=False, or a parametrization?): the masks stay what they are. "
                "Call advance() after each step.",
                stacklevel=5,  # past the hook and torch's wrapper of step()
            )

    def place(self, slot: _Slot) -> None:
        """Gives a slot its seed on the device of its weight, where a counter starts if there is none."""
        device = slot.layer.weight.device
        if device not in self._counters:
            step = next(iter(self._counters.values())).step if self._counters else torch.zeros(1, dtype=torch.int64)
            self._counters[device] = _Counter(step.to(device), self._masks)
            self._counters[device].draw(self._base, self.every)
        slot.seed = self._counters[device].seeds[slot.group : slot.group + 1]

    def follow(self, slot: _Slot) -> None:
        """To another device, after a layer was moved."""
        self.place(slot)
        used = {slot.seed.device for slot in self._slots}
        self._counters = {device: counter for device, counter in self._counters.items() if device in used}

    def _draw(self) -> None:
        """Seeds of the present step. Distinct Philox keys give independent streams, so consecutive keys will do."""
        for counter in self._counters.values():
            counter.draw(self._base, self.every)
        self.draws += 1

    def mix(self, slots: Iterable[_Slot]) -> None:
        """Writes Phi of these layers, one launch for each p, mask, backend and device."""
        # Phi made in inference mode could never be saved for backward.
        with torch.inference_mode(False), torch.no_grad():
            batches: dict[tuple[float, str, str, torch.device], list[_Slot]] = {}
            for slot in slots:
                backend = slot.prepare()
                if backend is not None:
                    kind = slot.layer.p, slot.layer.mask, backend, slot.layer.weight.device
                    batches.setdefault(kind, []).append(slot)
            for (p, mask, backend, _), batch in batches.items():
                for piece, targets in self._pieces(batch):
                    mixed = [slot.mixed for slot in piece if slot.mixed is not None]
                    operands = [slot.operands(target) for slot, target in zip(piece, targets, strict=True)]
                    weights, targets = (list(tensors) for tensors in zip(*operands, strict=True))
                    draws = [
                        Draw(slot.seed, p, strides_of(mask, w.shape)) for slot, w in zip(piece, weights, strict=True)
                    ]
                    backends.load(backend).mixout_list(mixed, weights, targets, draws)
                    # Written behind autograd's back: a backward that needs the old Phi must fail, not use the new.
                    torch.autograd.graph.increment_version(mixed)

    def _pieces(self, batch: list[_Slot]) -> Iterator[tuple[list[_Slot], list[Tensor | None]]]:
        """Layers to mix in one launch, and their targets on the device: all at once if they are there."""
        targets = [slot.layer.target for slot in batch]
        if not self.host_targets:
            yield batch, targets
            return
        cuts = host_memory.pieces(targets)
        present = host_memory.on_device([targets[cut] for cut in cuts], batch[0].layer.weight.device)
        yield from zip([batch[cut] for cut in cuts], present, strict=True)


class _Counter:
    """Optimizer steps so far, and the seeds of all masks, on one device."""

    def __init__(self, step: Tensor, masks: int) -> None:
        self.step = step
        self.offsets = torch.arange(masks, device=step.device)
        # 16 bytes apart: Triton compiles a kernel once more for pointers that are not aligned so.
        self.seeds = torch.empty(2 * masks, dtype=torch.int64, device=step.device)[::2]

    def draw(self, base: int, every: float) -> None:
        """On the device and in place, so that in a captured CUDA graph every replay draws its own masks."""
        draws = self.step * 0 if every == math.inf else self.step // int(every)
        torch.add(self.offsets, draws * self.offsets.numel() + base, out=self.seeds)


class _SharedInput:
    """What the first of some siblings made of their input, for the others: its cast to the compute dtype, and
    x[:, kept].

    Held until each has been called, with this input or another one (cross-attention), or the input is gone.
    """

    def __init__(self, siblings: int) -> None:
        self.siblings = siblings
        self.key: tuple[Any, ...] = ()
        self.input: weakref.ref[Tensor] | None = None
        self.cast: Tensor | None = None
        self.kept: Tensor | None = None
        self.called: set[_Slot] = set()

    def called_by(self, slot: _Slot) -> None:
        if slot in self.called:  # not all were called in the last round
            self.called.clear()
        self.called.add(slot)
        if len(self.called) == self.siblings:
            self.called.clear()
            self.clear()

    def get(self, input: Tensor, dtype: torch.dtype, draw: int) -> tuple[Tensor, Tensor | None]:
        # The same object, unchanged since, cast alike, under the same masks.
        if self.input is None or self.input() is not input or self.key != self._key(input, dtype, draw):
            return input.to(dtype), None
        return input if self.cast is None else self.cast, self.kept

    def put(self, input: Tensor, dtype: torch.dtype, draw: int, cast: Tensor, kept: Tensor) -> None:
        self.input = weakref.ref(input, self.clear)
        self.cast = None if cast is input else cast
        self.key, self.kept = self._key(input, dtype, draw), kept

    @staticmethod
    def _key(input: Tensor, dtype: torch.dtype, draw: int) -> tuple[Any, ...]:
        return input._version, input.requires_grad, dtype, draw, torch.is_grad_enabled()

    def clear(self, reference: weakref.ref[Tensor] | None = None) -> None:
        if reference is None or reference is self.input:
            self.input = self.cast = self.kept = None


class _Slot:
    """A layer's place in a sampler: its seed, its Phi, and what Phi was made from."""

    seed: Tensor

    def __init__(self, sampler: MixSampler, layer: MixLinear | MixConv1D, group: int, shared: _SharedInput) -> None:
        self.sampler = sampler
        self.layer = layer
        self.group = group
        self.shared = shared
        self.dtype: torch.dtype | None = None  # the compute dtype of the last forward
        self.mixed: Tensor | None = None
        self.made_from: tuple[Any, ...] = ()
        self.storages: list[StorageWeakRef] = []
        # What Phi may be made from. Under FSDP the layer has other Parameters in forward, and in between.
        self.parameter = layer.weight if _is_whole(layer.weight) else None

    def __call__(self, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        layer, sampler = self.layer, self.sampler
        # Compiled and transformed code cannot look at versions and addresses, so it could not tell that a Phi or an
        # x[:, kept] has gone stale; and a replica of nn.DataParallel is on another device than they are. These mix and
        # gather by themselves, with the same seed.
        moved = self.seed.device != weight.device
        alone = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if alone or (moved and weight.device != layer.weight.device):
            seed, target = self.seed.to(weight.device), host_memory.beside(weight, target)
            phi = MixedWeight(weight, target, None, Draw(seed, layer.p, strides_of(layer.mask, weight.shape)))
            return sampled_linear(input, phi, bias, GradientMask.of(layer.p))[0]
        if moved:
            sampler.follow(self)
        dtype = compute_dtype(input)
        premixed = sampler.premix is not False and self.parameter is not None and layer.weight is self.parameter
        mixed = self._present_mixed(dtype) if premixed else None
        if sampler.host_targets:  # with Phi neither pass needs the target
            target = None if mixed is not None else host_memory.beside(weight, target)
        share = self.shared.siblings > 1 and not input.is_inference()
        x, kept = self.shared.get(input, dtype, sampler.draws) if share else (input, None)
        phi = MixedWeight(weight, target, mixed, Draw(self.seed, layer.p, strides_of(layer.mask, weight.shape)))
        y, gathered = sampled_linear(x, phi, bias, GradientMask.of(layer.p), kept_input=kept)
        if share:
            if kept is None and gathered is not None and gathered.numel() > 0:
                self.shared.put(input, dtype, sampler.draws, x, gathered)
            self.shared.called_by(self)
        return y

    def _present_mixed(self, dtype: torch.dtype) -> Tensor | None:
        if self.made_from != self._origin(dtype):
            self.dtype = dtype
            self.sampler.mix([self])
        return self.mixed

    def _origin(self, dtype: torch.dtype | None) -> tuple[Any, ...]:
        """Changes when Phi must be made anew: the weight or the target was loaded, moved, stepped or tracked."""
        layer = self.layer
        versions = tuple((t.untyped_storage()._cdata, t.data_ptr(), t._version) for t in self._sources())
        return dtype, layer.p, layer.mask, versions

    def _sources(self) -> list[Tensor]:
        return [tensor for tensor in (self.layer.weight, self.layer.target) if tensor is not None]

    def operands(self, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and target as ``[out, in]``."""
        weight = self.layer.weight.detach()
        if isinstance(self.layer, MixConv1D):
            return weight.t(), None if target is None else target.t()
        return weight, target

    def prepare(self) -> str | None:
        """The backend that mixes this layer, with room for its Phi; None where mixing ahead does not apply.

        With target zero and a neuron mask it does not: the products then need the kept columns alone. Nor under FSDP,
        which has the whole weight in forward and backward only: Phi would undo its saving.
        """
        self.parameter = self.layer.weight if _is_whole(self.layer.weight) else None
        if self.parameter is None:
            self.mixed = None
            return None
        self.made_from = self._origin(self.dtype)
        # An address alone proves nothing: .bfloat16() and .float() in a row may end where they began. While a storage
        # is weakly referred to, no other one gets its identity.
        storages = [tensor.untyped_storage() for tensor in self._sources()]
        if [storage._cdata for storage in storages] != [reference.cdata for reference in self.storages]:
            self.storages = [StorageWeakRef(storage) for storage in storages]
        weight, target = self.operands(self.layer.target)
        zero_columns = target is None and self.layer.mask == "neuron"
        backend = "reference"
        premix = self.sampler.premix
        if premix is not False and self.dtype is not None and self.layer.p not in (0, 1) and not zero_columns:
            target_dtype = weight.dtype if target is None else target.dtype
            name, schedule = backends.selected(None, None)
            backend = backends.choose(name, schedule, weight.device.type, weight.dtype, target_dtype, self.dtype)
            if premix is None and backend != "reference" and not backends.load(backend).premixing_pays(self.dtype):
                backend = "reference"
        if backend == "reference":
            self.mixed = None
            return None
        if self.mixed is None or (self.mixed.dtype, self.mixed.device) != (self.dtype, weight.device):
            self.mixed = torch.empty_like(weight, dtype=self.dtype)
        return backend

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer has no sampler: nothing would advance the copy's masks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _is_whole(weight: Tensor) -> bool:
    """Neither a shard of FSDP (a DTensor, or a piece of a flat parameter), nor computed anew for each forward."""
    return type(weight) is nn.Parameter and weight.dim() == 2


def _groups(layers: dict[str, MixLinear | MixConv1D], share_masks: Iterable[Sequence[str]]) -> dict[str, int]:
    """The number of each layer's mask: the same for siblings that share one."""
    if isinstance(share_masks, str):
        raise TypeError(f"MixSampler: share_masks: expected groups of names, got the string {share_masks!r}")
    together = {}
    for k, names in enumerate(share_masks):
        if isinstance(names, str):
            raise TypeError(f"MixSampler: share_masks: expected groups of names, got the string {names!r}")
        together.update(dict.fromkeys(names, k))
    numbers: dict[Any, int] = {}
    groups = {}
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        key: Any = name
        if layer.mask == "neuron" and attribute in together:
            in_features = layer.nx if isinstance(layer, MixConv1D) else layer.in_features
            key = (parent, together[attribute], layer.p, in_features)
        groups[name] = numbers.setdefault(key, len(numbers))
    return groups


def _base_seed(seed: int | None, same_on_all_ranks: bool) -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64).item())
    elif not _is_64_bits(seed):
        raise ValueError(f"MixSampler: seed: expected an int of 64 bits or None, got {seed!r}")
    if not distributed:
        return seed
    if same_on_all_ranks:
        box = [seed]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    # Far apart, so that the consecutive keys of one rank never reach those of another.
    shifted = seed + torch.distributed.get_rank() * 0x9E3779B97F4A7C15
    return (shifted + 2**63) % 2**64 - 2**63


def _is_64_bits(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63


# One pair of hooks for all samplers, which stays: torch iterates over its dict of hooks, and one that the garbage
# collector took away at that moment, with its sampler, was an error in the optimizer's step.
_alive: weakref.WeakSet[MixSampler] = weakref.WeakSet()


@functools.cache
def _follow_optimizers() -> None:
    # Not traced into a compiled optimizer step, where neither addresses nor versions can be looked at.
    register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for sampler in list(_alive):
        sampler._before_step(optimizer)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for sampler in list(_alive):
        sampler._after_step(optimizer)
