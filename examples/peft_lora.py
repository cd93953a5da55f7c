"""Mixout for LoRA adapters: python examples/peft_lora.py [CHECKPOINT].

The pretrained weights are frozen, so mixing them with themselves would change nothing. What is trained is the
difference to them, B A; its pretrained value is zero. Mixing B with a target of zeros drops ranks of that difference
and scales the others up: in each dropped rank the layer falls back on the pretrained weight, as mixout does in each
dropped neuron.
"""

import sys

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mixout_kernels as mk

SENTENCES = ["a fine film", "a dull plot", "it is great", "it is poor"]
LABELS = torch.tensor([1, 0, 1, 0])


def main(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"], lora_dropout=0.0)
    model = get_peft_model(model, config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, b in layer.lora_B.items():
                layer.lora_B[name] = mk.MixLinear.from_linear(b, p=0.3, target=torch.zeros_like(b.weight))

    sampler = mk.MixSampler(model)
    optimizer = torch.optim.AdamW((w for w in model.parameters() if w.requires_grad), lr=2e-4)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model.train()
    for _ in range(4):
        model(**batch, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    mk.remove_mixout(model)  # plain adapters again: save them, or merge them into the weights
    return model, sampler


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bert-large-uncased")
