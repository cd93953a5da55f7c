"""Mixout in a training loop of your own, with gradient accumulation, saved in the middle and resumed.

python examples/plain_loop.py [CHECKPOINT FILE]
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mixout_kernels as mk

SENTENCES = ["a fine film", "a dull plot", "it is great", "it is poor"]
LABELS = torch.tensor([1, 0, 1, 0])
MICRO_BATCHES = 2  # to an optimizer step


def prepared(checkpoint):
    """The pretrained model with mixout, one mask for all micro-batches of a step, and an optimizer."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    print(mk.apply_mixout(model, p=0.7))  # the new classifier is left alone: there is no pretrained weight to mix with
    sampler = mk.MixSampler(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    return model, sampler, optimizer


def train(model, optimizer, batch, steps):
    model.train()
    for _ in range(steps):
        for micro_batch, labels in zip(batch.chunk(MICRO_BATCHES), LABELS.chunk(MICRO_BATCHES), strict=True):
            loss = model(input_ids=micro_batch, labels=labels).loss / MICRO_BATCHES
            loss.backward()
        optimizer.step()  # the next forward draws the masks of the next step
        optimizer.zero_grad()


def main(checkpoint, saved):
    torch.manual_seed(0)
    batch = AutoTokenizer.from_pretrained(checkpoint)(SENTENCES, padding=True, return_tensors="pt")["input_ids"]
    model, sampler, optimizer = prepared(checkpoint)
    train(model, optimizer, batch, steps=2)
    state = {
        "model": model.state_dict(),  # the trained weights alone: a target is what the checkpoint holds already
        "optimizer": optimizer.state_dict(),
        "sampler": sampler.state_dict(),
    }
    torch.save(state, saved)
    train(model, optimizer, batch, steps=2)

    # A restarted run loads the pretrained weights, which become the targets, and then its own. The masks go on as they
    # would have: its weights are the same, bit for bit.
    resumed, sampler, optimizer = prepared(checkpoint)
    state = torch.load(saved)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    train(resumed, optimizer, batch, steps=2)

    mk.remove_mixout(model)  # a plain model again, to evaluate, save or export
    mk.remove_mixout(resumed)
    return model, resumed


if __name__ == "__main__":
    checkpoint, saved = sys.argv[1:] or ("bert-large-uncased", "resume.pt")
    main(checkpoint, saved)
