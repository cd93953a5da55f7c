"""What other libraries ask for. Imported on first use, since each needs the library that it serves."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .pieces import is_distributed
from .sampler import MixSampler

_NAME = "MixSampler"  # among the stateful callbacks of a TrainerState


class MixSamplerCallback(TrainerCallback):
    """A sampler under transformers' Trainer: its state in the checkpoints, and less to send under DDP.

    .. code-block:: python

        mk.apply_mixout(model, p=0.7)
        sampler = mk.MixSampler(model)
        trainer = Trainer(model, ..., callbacks=[mk.MixSamplerCallback(sampler)])
        trainer.train(resume_from_checkpoint=True)

    The state, a seed and a number of steps, goes into the checkpoint's ``trainer_state.json``, which Trainer reads
    wherever it resumes from. A resumed run then has the masks of one that was never interrupted, bit for bit; it needs
    the pretrained targets again, as :func:`mixout_kernels.apply_mixout` says.

    Under DistributedDataParallel it registers a :class:`mixout_kernels.KeptColumns` when training begins, and under
    FSDP2 it calls :func:`mixout_kernels.shard_targets` then, unless the sampler needs whole targets.

    Args:
        sampler: of the model that is trained; or a function that is given the model when training begins, and makes it,
            for a model whose weights are in place only then. Of each model it is called once.
        kept_columns: True: that hook where it applies: not where each rank has masks of its own, and with a warning not
            where DDP has a communication hook already. A ``KeptColumns`` of the sampler: this one, with its settings;
            what keeps it from being registered is an error. False: none.

    Raises:
        TypeError, ValueError: for an argument that does not fit; when training begins, for a sampler of another model.
    """

    def __init__(self, sampler: MixSampler | Callable[[nn.Module], MixSampler], kept_columns: Any = True) -> None:
        made = isinstance(sampler, MixSampler)
        if not made and (not callable(sampler) or isinstance(sampler, nn.Module)):
            raise TypeError(
                "MixSamplerCallback: sampler: expected a MixSampler, or a function of the model that makes one, got "
                f"{type(sampler).__name__}"
            )
        if not isinstance(kept_columns, bool) and not hasattr(kept_columns, "sampler"):
            raise TypeError(
                "MixSamplerCallback: kept_columns: expected True, False or a KeptColumns, got "
                f"{type(kept_columns).__name__}"
            )
        if not isinstance(kept_columns, bool) and kept_columns.sampler is not sampler:
            raise ValueError("MixSamplerCallback: kept_columns: expected one of this sampler, got one of another")
        self._make: Any = None if made else sampler
        self._sampler: Any = sampler if made else None
        self.kept_columns = kept_columns
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._awaiting: RemovableHandle | None = None

    @property
    def sampler(self) -> MixSampler:
        """The sampler; a function that makes it is called when training begins."""
        if self._sampler is None:
            raise RuntimeError("MixSamplerCallback: the sampler is made when training begins, which it has not")
        return self._sampler

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The shape of what callbacks of transformers' own store there.
        state.stateful_callbacks[_NAME] = {"args": {}, "attributes": self.sampler.state_dict()}
        if not args.should_save:
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if os.path.isdir(folder):
            state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        else:  # the trials of a hyperparameter search have folders of their own
            warnings.warn(
                f"MixSamplerCallback: there is no {folder}: the sampler's state is not in this checkpoint", stacklevel=2
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._make is not None and (self._sampler is None or self._sampler.model is not model):
            self._sampler = self._made_for(model)
        self._check_model(model)
        saved = state.stateful_callbacks.get(_NAME)
        if saved is not None:
            self.sampler.load_state_dict(saved["attributes"])
        elif state.global_step > 0:
            warnings.warn(
                f"MixSamplerCallback: the checkpoint of step {state.global_step} was saved without this callback and "
                "has no state of a sampler: the masks are not those of an uninterrupted run",
                stacklevel=2,
            )
        self._shard_targets()
        if self.kept_columns is not False and torch.distributed.is_available() and self._awaiting is None:
            # Trainer tells callbacks of the model alone, not of the DDP around it: the first call shows that.
            self._awaiting = register_module_forward_pre_hook(self._see)

    def _made_for(self, model: nn.Module) -> MixSampler:
        sampler = self._make(model)
        if not isinstance(sampler, MixSampler):
            raise TypeError(
                f"MixSamplerCallback: sampler: expected a function that makes a MixSampler, got one that returns a "
                f"{type(sampler).__name__}"
            )
        return sampler

    def _check_model(self, model: nn.Module | None) -> None:
        layers = [slot.layer for slot in self.sampler.slots]
        if model is not None and layers and set(layers).isdisjoint(model.modules()):
            raise ValueError(
                "MixSamplerCallback: sampler: expected one of the model that Trainer trains, got one of another: none "
                f"of its {len(layers)} layers is in this {type(model).__name__}"
            )

    def _shard_targets(self) -> None:
        sampler = self.sampler
        if sampler.model is None or sampler.shards is not None or not sampler.same_on_all_ranks or sampler.host_targets:
            return
        if any(is_distributed(slot.layer.weight) for slot in sampler.slots):
            from .distributed import shard_targets

            shard_targets(sampler.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop_awaiting()

    def _stop_awaiting(self) -> None:
        if self._awaiting is not None:
            self._awaiting.remove()
            self._awaiting = None

    def _see(self, module: nn.Module, _: Any) -> None:
        """Any module is called: if it is the trained model, with all that is around it, look for DDP there."""
        if not module.training:
            return
        inside = list(module.modules())
        if any(one is self.sampler.model for one in inside):
            self._stop_awaiting()
            for one in inside:
                if isinstance(one, DistributedDataParallel) and one not in self._hooked:
                    self._hook(one)

    def _hook(self, ddp: DistributedDataParallel) -> None:
        from .distributed import KeptColumns, kept_columns_hook

        by_default = self.kept_columns is True
        if by_default and not self.sampler.same_on_all_ranks:
            return
        hook = KeptColumns(self.sampler, inner_state=ddp.process_group) if by_default else self.kept_columns
        try:
            ddp.register_comm_hook(hook, kept_columns_hook)
        except RuntimeError as error:
            if not by_default:
                raise
            warnings.warn(f"MixSamplerCallback: kept_columns: gradients are sent whole, since {error}", stacklevel=2)
        self._hooked.add(ddp)
