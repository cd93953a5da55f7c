"""The kernels, one module per backend, imported on first use. They never import one another.

contract.py      what a backend is, and the records that it is called with
choice.py        which one a call uses
gpu_linear.py    the linear layer put together from the primitives of a GPU backend, once for both
cpu.py, cuda/, triton/
"""

from .choice import BACKENDS, KERNELS, PREFERENCE, SCHEDULES, Choice, choose, kernels, load, present, selected
from .contract import Backend, LinearCall, LinearPlan, MixedWeight, WeightGradient

__all__ = [
    "BACKENDS",
    "KERNELS",
    "PREFERENCE",
    "SCHEDULES",
    "Backend",
    "Choice",
    "LinearCall",
    "LinearPlan",
    "MixedWeight",
    "WeightGradient",
    "choose",
    "kernels",
    "load",
    "present",
    "selected",
]
