"""The sampler in rooms. Calls go down only:

sampler.py        MixSampler: its life, and what follows from a step
  following.py    hooks of every optimizer's step
  ranks.py        what the processes of a group agree on
  slot.py         a layer's place: what its forward calls
    backward.py   the end of a backward
    shards/       FSDP2 and tensor parallelism: targets in pieces, Phi gathered, the kept columns alone reduced
    steps.py      what counts as an optimizer step
    siblings.py   what layers with the same input share
    phi.py        Phi of all layers, its staleness, the launch
      host_memory.py  targets in host memory
      layers.py   a layer's weight, and its draw
        seeds.py  the keys of all masks
"""

from .sampler import MixSampler

__all__ = ["MixSampler"]
