"""Mixout (Lee, Cho & Kang, ICLR 2020) at a negative price: fused kernels and a drop-in ``torch.nn.Linear``."""

from . import reference
from .functional import keep_mask, mix_linear, mixout

__version__ = "0.1.0"
__all__ = ["keep_mask", "mix_linear", "mixout", "reference"]
