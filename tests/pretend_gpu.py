"""A pytest plugin, ``-p tests.pretend_gpu``: torch finds a GPU, so that what would be collected there can be seen."""

from __future__ import annotations

import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "pretended"
