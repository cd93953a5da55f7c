"""Any local transformers checkpoint as a sequence classifier, loaded without a word on the console."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.common.errors import CommandError

# The report of the missing head, and the bars of loading.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Checkpoint:
    """A folder with a pretrained model and its tokenizer."""

    def __init__(self, folder: Path, max_length: int) -> None:
        if not folder.is_dir():
            raise CommandError(f"--model {folder}: no such folder; expected a transformers checkpoint on this disk")
        if not (folder / "config.json").is_file():
            raise CommandError(f"--model {folder}: no config.json in it; expected a transformers checkpoint")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever its parsers raise
            raise CommandError(f"--model {folder}: cannot load its tokenizer: {_first_line(error)}") from None
        positions = getattr(config, "max_position_embeddings", -1)  # -1: no limit, in XLNet
        longest = min(positions if positions > 0 else max_length, tokenizer.model_max_length)
        if max_length > longest:
            raise CommandError(f"--max-length {max_length}: this model takes at most {longest} tokens")
        known = getattr(config, "vocab_size", 0)
        if len(tokenizer) > known:
            raise CommandError(f"--model {folder}: its tokenizer has {len(tokenizer)} tokens, the model {known}")
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise CommandError(f"--model {folder}: its tokenizer has no padding token")
            tokenizer.pad_token = tokenizer.eos_token
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = tokenizer

    def attention(self, wanted: str | None = None) -> str:
        """The implementation that a model has of which ``wanted`` is asked for: transformers' own choice for None."""
        config = self.load(2, wanted).config
        return str(config._attn_implementation)

    def load(self, num_labels: int, attention: str | None = None) -> PreTrainedModel:
        """The model in float32; a classifier head that the checkpoint lacks is drawn from the default generator.

        ``attention`` is transformers' ``attn_implementation``, None its own choice.
        """
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                local_files_only=True,
                num_labels=num_labels,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                attn_implementation=attention,
            )
        except Exception as error:  # as above
            reason = _first_line(error)
            raise CommandError(f"--model {self.folder}: cannot load a sequence classifier: {reason}") from None
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
