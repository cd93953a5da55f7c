"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators, which it cannot look into.

Its module imports triton, 0.3 s, so nothing is registered before somebody counts: a counter that is active when an
operator is called gets the formulas then.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def tell_active_counters() -> None:
    """Gives the formulas to torch's registry, and to the counters that have copied it already."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for packet, formula in _FORMULAS.items():
        if packet not in module.flop_registry:
            module.register_flop_formula(packet)(formula)
        for mode in _get_current_dispatch_mode_stack():
            if (counter := getattr(mode, "counter", None)) is not None and hasattr(counter, "flop_registry"):
                counter.flop_registry.setdefault(packet, module.flop_registry[packet])


def _mix_linear(input: Any, weight: Any, *_: Any, **__: Any) -> int:
    """y = x Phi^T, counted as a dense product: mixing is none."""
    rows = torch.Size(input[:-1]).numel()
    return 2 * rows * weight[0] * weight[1]


def _mix_linear_backward(grad: Any, saved_input: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """dx = g Phi, and dw = g^T x over those columns of x that were saved for it."""
    needs = rest[-1]
    rows = torch.Size(grad[:-1]).numel()
    dx = 2 * rows * weight[0] * weight[1] if needs[0] else 0
    dw = 2 * rows * weight[0] * saved_input[-1] if needs[1] else 0
    return dx + dw


_FORMULAS = {
    torch.ops.mixout_kernels.mix_linear: _mix_linear,
    torch.ops.mixout_kernels.mix_linear_backward: _mix_linear_backward,
}
