"""Weights that are pulled to their pretrained values: decay towards targets after every optimizer step."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import checks
from .checkpoints import Pretrained, Source
from .evidence import Evidence, own_patterns
from .modules import MixedLayer, frozen_copy, target_keepers
from .optimizers import step_taken, unwrapped
from .patterns import each_must_match, matches, patterns
from .pieces import distributed_like, is_distributed, local, own_piece
from .targets import changes_of, check_pieces, lerp


def decay_to_target(
    optimizer: Optimizer,
    model: nn.Module,
    decay: float | Callable[[int], float],
    *,
    exclude: Iterable[str] | None = None,
    missing_keys: Iterable[str] | None = None,
    targets: Source | None = None,
) -> RemovableHandle:
    """Weight decay towards the pretrained weights after every optimizer step: ``w -= lr * decay * (w - u)``.

    This is wdecay(w_pre, lambda) of the Mixout paper (section 5; L2-SP of Li et al., ICML 2018), decoupled as in AdamW;
    set the optimizer's own ``weight_decay`` to 0. Like that one it leaves alone what has no gradient, such as a block
    that ``apply_graddrop(mask="layer")`` has switched off. It needs no mixout in the model, and goes with it. Weights
    in bfloat16 or float16 round the pull away where lr * decay * (w - u) is less than half a unit in the last place of
    w, as it is at usual rates: train in float32, under autocast.

    Args:
        optimizer: holds the parameters; lr is that of their group at each step. Wrapped by accelerate or not.
        model: with its pretrained weights. u is the target of a mixout layer where there is one, and a frozen copy of
            the parameter as it is now everywhere else (this costs the bytes of those parameters that train). One that
            trains later, when it is unfrozen or ``optimizer.add_param_group`` has added it, is copied in its first
            step; if it was changed or replaced until then, a warning says that it is not pulled. The model may be moved
            or go through ``fully_shard`` after this, if every rank has the pretrained weights now. After
            :func:`mixout_kernels.remove_mixout` the pull goes on, to the last targets.
        decay: lambda >= 0, or a function that gives it for the number of steps taken before, from 0 on.
        exclude: patterns of parameters that are not pulled. None leaves out new ones, as
            :func:`mixout_kernels.apply_mixout` does; a list says all, so that ``()`` pulls every parameter.
        missing_keys: as in :func:`mixout_kernels.apply_mixout`.
        targets: where the pretrained parameters are, as in :func:`mixout_kernels.apply_mixout`, for a model that holds
            the weights of a training checkpoint already: without it, biases, norms and embeddings would be pulled to
            those. Parameters that it does not have are not pulled. Targets of mixout layers are theirs all the same.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Warns:
        UserWarning: in a step of an optimizer that holds none of those parameters any more; once.

    Raises:
        ValueError: for a decay that is negative or not finite, a pattern that matches nothing, or if the optimizer
            holds no parameter of the model that is not excluded, or one without values (on the meta device).
        TypeError: for a model with mixout under FSDP1, whose pieces of weights belong to no rows of a target, or for an
            optimizer, a model, a decay or ``targets`` of another kind. In a step, for a model that was resized, or
            wrapped by FSDP1, since.
        FileNotFoundError: if ``targets`` is a path where there is no checkpoint.
    """
    optimizer = unwrapped("decay_to_target", optimizer)
    checks.module("decay_to_target", model)
    if not callable(decay):
        _check_decay(decay)
    excluded = () if exclude is None else patterns("decay_to_target", "exclude", exclude)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    each_must_match("decay_to_target", "exclude", own_patterns(excluded), names, "parameter")
    evidence = Evidence("decay_to_target", model, missing_keys)
    pretrained = None if targets is None else Pretrained("decay_to_target", targets, model)
    places: dict[Tensor, _Place] = {}
    for module_name, module in model.named_modules():
        for path, parameter in module.named_parameters(module_name, recurse=False):
            if any(matches(path, pattern) for pattern in excluded):
                continue
            place = _Place(path, module, parameter, new=evidence.reason_against(parameter) is not None)
            known = places.get(parameter)
            if place.target is not None:  # of the places of a tied one, that which has a target
                if known is None or known.target is None:
                    places[parameter] = place
            elif known is None and (not place.new or pretrained is not None or exclude is not None):
                places[parameter] = place
    held = _parameters_by_id(optimizer)
    pull = _Pull(decay, pretrained, places.values())
    for parameter, place in places.items():
        if id(parameter) in held and parameter.requires_grad and place.target is None:
            pull.take_copy(place, parameter)
    pull.release_unless_waiting()
    present = [place for place in pull.places if place.parameter_in(held) is not None]
    if not present:
        raise ValueError(
            "decay_to_target: optimizer: expected one that holds pretrained parameters of the model outside "
            f"exclude={tuple(excluded)!r}, got none"
        )
    layers = [place.module for place in present if place.target is not None]
    check_pieces("decay_to_target", cast("list[MixedLayer]", layers))
    target_keepers.add(pull)
    return _Handle(optimizer.register_step_pre_hook(pull.before), optimizer.register_step_post_hook(pull.after))


class _Handle(RemovableHandle):
    """Removes several hooks."""

    def __init__(self, *handles: RemovableHandle) -> None:
        super().__init__(OrderedDict())
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Place:
    """Where a parameter that is pulled lies.

    FSDP2, ``load_state_dict(assign=True)`` and others put another Parameter there, so it is looked up at each step.
    """

    def __init__(self, path: str, module: nn.Module, parameter: Tensor, new: bool) -> None:
        self.path, self.module, self.new = path, module, new
        self.name = path.rpartition(".")[2]
        # u where the layer has no target: a tensor of its own, or the last target; whole, or sharded as the parameter.
        self.copy: Tensor | None = None
        # Weak: what fully_shard has replaced is to be let go.
        self._first = self._last = weakref.ref(parameter)
        self._version = changes_of(parameter)

    @property
    def target(self) -> Tensor | None:
        return self.module.target if isinstance(self.module, MixedLayer) and self.name == "weight" else None

    def parameter_in(self, held: Container[int]) -> Tensor | None:
        """The Parameter of this place, if it is among these, by id."""
        if self.name == "weight" and isinstance(self.module, MixedLayer) and self.module.gathered is not None:
            present = self.module.gathered.weight
        else:
            present = self.module._parameters.get(self.name)
        if present is not None and id(present) in held:
            if self._last() is not present:
                self._last = weakref.ref(present)
            return present
        # What FSDP has gathered may lie in place of the optimizer's own, but a shard is what an optimizer would hold.
        last = None if is_distributed(present) else self._last()
        return last if last is not None and id(last) in held else None

    def is_unchanged(self, parameter: Tensor, *, value: bool = True) -> bool:
        """Whether it is the one that lay here at first, with the value that it had then."""
        return parameter is self._first() and not (value and changes_of(parameter) != self._version)

    def end(self, weight: Tensor) -> Tensor | None:
        """u for this rank's piece of the weight."""
        target = self.target
        end = self.copy if target is None else target
        if end is None:
            return None
        if end.shape != weight.shape or (is_distributed(end) and not is_distributed(weight)):
            raise TypeError(
                f"decay_to_target: model: expected {self.path!r} as its pretrained value is, a {type(end).__name__} "
                f"{list(end.shape)}, got a {type(weight).__name__} {list(weight.shape)}: call decay_to_target after "
                "what resizes the model, and after FSDP1 wraps it (fully_shard may come before or after)"
            )
        piece = own_piece(end, weight)
        if target is None and (piece is not local(end) or piece.device != local(weight).device):
            piece = piece.to(local(weight).device, copy=True)  # keeps nothing larger than itself alive
            self.copy = distributed_like(piece, weight) if is_distributed(weight) else piece
        return piece


class _Pull:
    """What the hooks of :func:`decay_to_target` do."""

    def __init__(
        self, decay: float | Callable[[int], float], pretrained: Pretrained | None, places: Iterable[_Place]
    ) -> None:
        self.places = list(places)
        self._waiting = [place for place in self.places if place.target is None]  # to train: they are copied then
        self._decay, self._pretrained = decay, pretrained
        self._steps = 0
        self._said_that_none_is_held = False

    def take_copy(self, place: _Place, parameter: Tensor) -> None:
        piece = local(parameter)
        if piece.is_meta:
            raise ValueError(
                f"decay_to_target: model: expected pretrained weights, got {place.path!r} on the meta device: call it "
                "once every rank has its weights"
            )
        self._waiting.remove(place)
        source = piece if self._pretrained is None else self._pretrained.find(parameter, expected=not place.new)
        if source is None:
            self.places.remove(place)
            return
        copy = frozen_copy(source).to(piece)
        place.copy = distributed_like(copy, parameter) if is_distributed(parameter) else copy

    def release_unless_waiting(self) -> None:
        if not self._waiting:
            self._pretrained = None  # which may be as large as the model

    def keep_targets(self, layers: Container[nn.Module]) -> None:
        """Those of these layers, which are about to lose them."""
        for place in self.places:
            if place.module in layers and place.target is not None:
                place.copy = place.target
                self._waiting = [other for other in self._waiting if other is not place]

    @torch.no_grad()
    def before(self, optimizer: Optimizer, *_: Any) -> None:
        """Copies what trains from this step on: until now it was not in the optimizer, or did not require grad."""
        waiting = [place for place in self._waiting if place.target is None]
        if not waiting:
            return
        held = _parameters_by_id(optimizer)
        changed = []
        for place in waiting:
            parameter = place.parameter_in(held)
            if parameter is None or not parameter.requires_grad:
                continue
            if place.is_unchanged(parameter, value=self._pretrained is None):
                self.take_copy(place, parameter)
            else:
                self._waiting.remove(place)
                changed.append(place.path)
        self.release_unless_waiting()
        if changed:
            warnings.warn(
                f"decay_to_target: not pulled: {', '.join(map(repr, changed[:8]))}, {len(changed)} in all, which train "
                "from this step on, and were changed or replaced since decay_to_target was called: their pretrained "
                "values are not known. Call it with all of them in the optimizer, or with targets=",
                stacklevel=2,
            )

    @torch.no_grad()
    def after(self, optimizer: Optimizer, *_: Any) -> None:
        decay = _check_decay(self._decay(self._steps)) if callable(self._decay) else self._decay
        self._steps += 1
        held = _parameters_by_id(optimizer)
        places: dict[int, _Place] = {}
        for place in self.places:
            if (parameter := place.parameter_in(held)) is not None:
                places.setdefault(id(parameter), place)
        if not places and not self._said_that_none_is_held:
            self._said_that_none_is_held = True
            warnings.warn(
                "decay_to_target: the optimizer holds none of the parameters of the model any more, so that none is "
                "pulled (were they replaced by fully_shard, and the optimizer's were not?)",
                stacklevel=2,
            )
        for group in optimizer.param_groups:
            weights, ends = [], []
            for weight in group["params"]:
                # As torch's own decay: what has no gradient, a block that is off for one, stands still.
                found = None if weight.grad is None else places.get(id(weight))
                if found is not None and (end := found.end(weight)) is not None:
                    weights.append(local(weight))
                    ends.append(end)
            lerp(weights, ends, group["lr"] * decay * step_taken(optimizer))


def _parameters_by_id(optimizer: Optimizer) -> dict[int, Tensor]:
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def _check_decay(decay: Any) -> float:
    expected = "a finite number >= 0, or a function that gives one"
    checks.at_least_zero("decay_to_target", "decay", decay, expected)
    return decay
