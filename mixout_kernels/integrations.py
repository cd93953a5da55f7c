"""What other libraries ask for. Imported on first use, since each needs the library that it serves."""

from __future__ import annotations

import os
import warnings
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .sampler import MixSampler

_NAME = "MixSampler"  # among the stateful callbacks of a TrainerState


class MixSamplerCallback(TrainerCallback):
    """Keeps a sampler's state in the checkpoints of transformers' Trainer, and goes on with it in a resumed run.

    .. code-block:: python

        mk.apply_mixout(model, p=0.7)
        sampler = mk.MixSampler(model)
        trainer = Trainer(model, ..., callbacks=[mk.MixSamplerCallback(sampler)])
        trainer.train(resume_from_checkpoint=True)

    The state, a seed and a number of steps, goes into the checkpoint's ``trainer_state.json``, which Trainer reads
    wherever it resumes from. A resumed run then has the masks of one that was never interrupted, bit for bit; it needs
    the pretrained targets again, as :func:`mixout_kernels.apply_mixout` says.

    Args:
        sampler: of the model that is trained.

    Raises:
        TypeError: for another object.
    """

    def __init__(self, sampler: MixSampler) -> None:
        if not isinstance(sampler, MixSampler):
            raise TypeError(f"MixSamplerCallback: sampler: expected a MixSampler, got {type(sampler).__name__}")
        self.sampler = sampler

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(_NAME)
        if saved is not None:
            self.sampler.load_state_dict(saved["attributes"])
        elif state.global_step > 0:
            warnings.warn(
                f"MixSamplerCallback: the checkpoint of step {state.global_step} was saved without this callback and "
                "has no state of a sampler: the masks are not those of an uninterrupted run",
                stacklevel=2,
            )
