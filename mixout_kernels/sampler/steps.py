"""What counts as an optimizer step, whoever takes it.

A step of any ``torch.optim`` optimizer that holds a mixed weight is looked at, and

- one *within* the step of another optimizer (SAM, Lookahead, ZeroRedundancyOptimizer) and that other step are one;
- of several optimizers that hold a part of the mixed weights each, one *round* is one step: it begins when an optimizer
  steps a weight that was stepped before in the present round. So two optimizers with a half of the layers each, or one
  optimizer for each Parameter in hooks of backward, count once for each time that all of them step;
- a step that cannot have trained anything is none: no Parameter of the optimizer has a gradient and no mixed weight was
  changed; or lr is 0 and every gradient too, as ``torch.distributed.checkpoint`` does to fill an optimizer's state.

Counted or not, what the step changed is mixed anew.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..modules import MixedLayer
from ..optimizers import step_taken

# Training forwards without any step seen, after which this is said. Few train with more micro-batches a step.
FORWARDS_WITHOUT_STEP = 256
# The same for steps of optimizers that hold no mixed weight, with a training forward before each: a GAN's other
# optimizer may come first, but not many times.
STEPS_OF_STRANGERS = 3
# The same for counted steps at which every mixed layer is in eval mode, as from_pretrained leaves a model.
STEPS_IN_EVAL_MODE = 3

Ids = tuple[int, ...]


class _Before(NamedTuple):
    """How things were when an optimizer's step began."""

    held: frozenset[int]  # the mixed weights that it holds, by id
    counts: int
    stepped: frozenset[int]
    versions: list[int] | None  # of the mixed weights, where no gradient was there


class Steps:
    """Counts steps for one sampler. Decides only: what follows from a step is the sampler's to do."""

    def __init__(self, layers: Sequence[MixedLayer], others: Callable[[], Iterable[Tensor]] = tuple) -> None:
        """``others``: Parameters that count as mixed weights do, though no layer holds them."""
        self.seen = False  # a step was counted, or the user counts by hand
        self._layers = layers
        self._others = others
        self._counts = 0
        self._stepped: frozenset[int] = frozenset()  # in the present round
        self._held: weakref.WeakKeyDictionary[Optimizer, tuple[Ids, Ids, frozenset[int]]]
        self._held = weakref.WeakKeyDictionary()
        self._before: weakref.WeakKeyDictionary[Optimizer, _Before] = weakref.WeakKeyDictionary()
        self._watched: MixedLayer | None = None  # the first that was called in training: its forwards are counted
        self._forwards = self._forwards_at_stranger = self._strangers = 0
        self._steps_in_eval_mode: int | None = 0  # None once a step was taken in training mode
        self._said: set[str] = set()

    def before(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """An optimizer's step begins; ``parameters`` are all that it holds."""
        held = self._held_by(optimizer, parameters)
        versions = None if _any_gradient(parameters) else self._versions()
        self._before[optimizer] = _Before(held, self._counts, self._stepped, versions)

    def after(self, optimizer: Optimizer, parameters: list[Tensor]) -> int | Tensor | None:
        """What the step that has ended counts; None where it has nothing to do with the mixed weights."""
        before = self._before.pop(optimizer, None)
        if before is None:  # it began before this sampler was made
            before = _Before(self._held_by(optimizer, parameters), self._counts, self._stepped, None)
        if not before.held:
            self._note_stranger()
            return None
        if before.versions is not None and not _any_gradient(parameters) and before.versions == self._versions():
            return None
        within = before.counts != self._counts
        if within or (before.stepped and before.stepped.isdisjoint(before.held)):
            self._stepped |= before.held
            return 0
        steps = step_taken(optimizer)
        if not isinstance(steps, Tensor) and steps == 0:
            return 0
        self._counts += 1
        self._stepped = before.held
        self.seen = True
        self._note_mode()
        return steps

    def note_forward(self, layer: MixedLayer) -> None:
        """A forward in training, as long as no step was seen."""
        if self._watched is None:
            self._watched = layer
        if layer is not self._watched:
            return
        self._forwards += 1
        if self._forwards == FORWARDS_WITHOUT_STEP:
            self._say(
                f"{FORWARDS_WITHOUT_STEP} training forwards, and no step of a torch.optim optimizer that holds a "
                "mixed weight: the masks are still the first ones. Unless these are micro-batches of one step, call "
                "advance() after each update of the weights."
            )

    def _note_stranger(self) -> None:
        if self.seen:
            return
        if next(self._weights(), None) is None:
            self._say(
                "an optimizer took a step, but the weights of the mixed layers are no Parameters that it could hold "
                "(FSDP with use_orig_params=False?): the masks stay what they are. Call advance() after each step."
            )
        elif self._forwards > self._forwards_at_stranger:
            self._forwards_at_stranger = self._forwards
            self._strangers += 1
            if self._strangers == STEPS_OF_STRANGERS:
                self._say(
                    "optimizers take steps, but none holds a mixed weight (DeepSpeed ZeRO, or another that steps "
                    "copies of the weights?): the masks stay what they are. Call advance() after each step."
                )

    def _note_mode(self) -> None:
        if self._steps_in_eval_mode is None:
            return
        if not self._layers or any(layer.training for layer in self._layers):
            self._steps_in_eval_mode = None
            return
        self._steps_in_eval_mode += 1
        if self._steps_in_eval_mode == STEPS_IN_EVAL_MODE:
            self._say(
                f"{STEPS_IN_EVAL_MODE} optimizer steps, and every mixed layer is in eval mode, in which nothing is "
                "mixed: call model.train() before training, since from_pretrained returns a model in eval mode"
            )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"MixSampler: {message}", stacklevel=3)

    def _held_by(self, optimizer: Optimizer, parameters: list[Tensor]) -> frozenset[int]:
        """The mixed weights among these, by id; looked for again only when the optimizer or the model has others."""
        ids, mixed = tuple(map(id, parameters)), tuple(map(id, self._weights()))
        known = self._held.get(optimizer)
        if known is None or known[:2] != (ids, mixed):
            known = ids, mixed, frozenset(ids).intersection(mixed)
            self._held[optimizer] = known
            self._stepped = self._stepped.intersection(mixed)  # a weight that was replaced is in no round
        return known[2]

    def _versions(self) -> list[int]:
        return [weight._version for weight in self._weights()]

    def _weights(self) -> Iterator[Tensor]:
        for layer in self._layers:
            # What FSDP has gathered is another Parameter than the optimizer's.
            weight = layer._parameters.get("weight") if layer.gathered is None else layer.gathered.weight
            if weight is not None:
                yield weight
            else:
                yield from _behind_weight(layer)
        yield from self._others()


def _behind_weight(layer: MixedLayer) -> list[nn.Parameter]:
    """The Parameters behind a layer's weight: itself, or what a parametrization computes it from."""
    return [parameter for name, parameter in layer.named_parameters() if name != "bias"]


def _any_gradient(parameters: list[Tensor]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)
