"""Mixout in an accelerate loop, with its gradient accumulation.

accelerate launch examples/accelerate_loop.py [CHECKPOINT]
"""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mixout_kernels as mk

EXAMPLES = [("a fine film", 1), ("a dull plot", 0), ("it is great", 1), ("it is poor", 0)] * 4


def main(checkpoint):
    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    accelerator.print(mk.apply_mixout(model, p=0.7))  # before prepare()
    sampler = mk.MixSampler(model)

    def collate(examples):
        texts, labels = zip(*examples, strict=True)
        return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}

    loader = torch.utils.data.DataLoader(EXAMPLES, batch_size=4, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Where it goes, it goes on from: accelerator.save_state() keeps the sampler's seed and step with the rest.
    accelerator.register_for_checkpointing(sampler)

    wrapped.train()
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()  # a step of the optimizer after every second batch, and with it new masks
            optimizer.zero_grad()
    mk.remove_mixout(model)  # a plain model again, to evaluate, save or export
    return model, sampler


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bert-large-uncased")
