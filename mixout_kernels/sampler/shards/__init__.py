"""Layers whose weights are DTensors, each with the piece of its target that belongs to its piece of the weight.

shards.py                  all of a sampler's: which are sharded how, and what is hung onto FSDP for them
  kept_all_gather.py       FSDP2: the kept columns of Phi are gathered, into a whole target
  kept_reduce_scatter.py   FSDP2: the kept columns of gradients are reduced
    gathering.py           FSDP2: a layer whose Phi is gathered, and never used when it is not of this moment
  scratch.py               memory between calls
  tensor_parallel.py       a layer that computes with its piece
  placing.py               targets, piece by piece
"""

from .shards import Shards, needs_pieces

__all__ = ["Shards", "needs_pieces"]
