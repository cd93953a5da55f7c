"""Mixout under transformers' Trainer: python examples/trainer.py [CHECKPOINT]."""

import sys
import tempfile

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import mixout_kernels as mk

EXAMPLES = [("a fine film", 1), ("a dull plot", 0), ("it is great", 1), ("it is poor", 0)] * 4


def main(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    print(mk.apply_mixout(model, p=0.7))  # before the Trainer, which may wrap the model
    sampler = mk.MixSampler(model)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=4,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=2e-5,
                report_to="none",
            ),
            train_dataset=[{**tokenizer(text), "labels": label} for text, label in EXAMPLES],
            processing_class=tokenizer,
            callbacks=[mk.MixSamplerCallback(sampler)],  # the sampler's state goes into Trainer's checkpoints
        )
        trainer.train()
    mk.remove_mixout(model)  # a plain model again, to evaluate, save or export
    return model, sampler


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bert-large-uncased")
