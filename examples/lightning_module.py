"""Mixout in a LightningModule: python examples/lightning_module.py [CHECKPOINT]."""

import sys

import lightning
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mixout_kernels as mk

EXAMPLES = [("a fine film", 1), ("a dull plot", 0), ("it is great", 1), ("it is poor", 0)] * 4


class Classifier(lightning.LightningModule):
    def __init__(self, checkpoint):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
        self.model.train()  # from_pretrained gives it in eval mode, and Lightning leaves it as it is
        mk.apply_mixout(self.model, p=0.7)
        self.sampler = mk.MixSampler(self.model)

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-5)

    # The targets are no part of a checkpoint; the sampler's seed and step are two numbers beside the weights.
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mixout"] = self.sampler.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.sampler.load_state_dict(checkpoint["mixout"])


def main(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def collate(examples):
        texts, labels = zip(*examples, strict=True)
        return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}

    module = Classifier(checkpoint)
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(EXAMPLES, batch_size=4, collate_fn=collate))
    mk.remove_mixout(module.model)  # a plain model again, to evaluate, save or export
    return module


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bert-large-uncased")
