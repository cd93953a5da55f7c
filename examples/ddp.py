"""Mixout under DistributedDataParallel: torchrun --nproc-per-node 2 examples/ddp.py [CHECKPOINT]."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mixout_kernels as mk

EXAMPLES = [("a fine film", 1), ("a dull plot", 0), ("it is great", 1), ("it is poor", 0)] * 4


def main(checkpoint):
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if on_gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if on_gpu else "cpu")

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2).to(device)
    report = mk.apply_mixout(model, p=0.7)  # before DDP, which then leaves the targets alone
    if rank == 0:
        print(report)
    sampler = mk.MixSampler(model)  # the same masks on every rank; same_on_all_ranks=False draws them for each
    parallel = DistributedDataParallel(model)
    kept = mk.KeptColumns(sampler)  # with masks of each rank's own there is nothing to spare: leave these two lines out
    parallel.register_comm_hook(kept, mk.kept_columns_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    parallel.train()
    for text, label in EXAMPLES[rank::ranks]:
        batch = tokenizer(text, return_tensors="pt").to(device)
        parallel(**batch, labels=torch.tensor([label], device=device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    everyone = [None] * ranks
    dist.all_gather_object(everyone, (sampler.state_dict(), model.classifier.weight.sum().item()))
    assert all(one == everyone[0] for one in everyone), "the ranks went apart"
    if rank == 0:
        print(f"{ranks} ranks, the same weights and masks on each after {sampler.step} steps")
        print(f"{kept.sent_bytes / kept.dense_bytes:.0%} of the gradients' bytes were sent")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bert-large-uncased")
