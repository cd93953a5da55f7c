"""Mixout across processes, on torch's own engines: what one mask for all ranks drops need not travel.

kept_columns.py       DistributedDataParallel: a communication hook that reduces the kept columns alone
  kept.py             which part of each gradient a sampler's present masks keep
sharding.py           FSDP2 and tensor parallelism: targets that lie where their weights lie (the rest is the sampler's)
"""

from .kept_columns import KeptColumns, kept_columns_hook
from .sharding import shard_targets

__all__ = ["KeptColumns", "kept_columns_hook", "shard_targets"]
