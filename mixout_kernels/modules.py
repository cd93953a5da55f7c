"""Drop-in modules: ``nn.Linear``, and transformers' ``Conv1D``, with mixout on their weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .functional import Mask, mix_linear


class MixLinear(nn.Linear):
    """An ``nn.Linear`` whose weight is mixed with a frozen target while training.

    ``y = x Phi^T + b`` with ``Phi = u + M * (w - u) / (1 - p)`` (Lee, Cho & Kang, ICLR 2020, eq. 4); see
    :func:`mixout_kernels.mix_linear`. In eval mode it is an ``nn.Linear``, bit for bit.

    The state_dict has the keys of ``nn.Linear``, so checkpoints load both ways: the target is a non-persistent buffer,
    which follows ``.to()``, ``.half()``, ``copy.deepcopy`` and pickling of the module.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        p: the mix probability in [0, 1].
        target: u, ``[out_features, in_features]``; it is not copied. None is zero: dropout of the input features or
            dropconnect.
        mask: "neuron", one decision per input feature, or "weight", one per element.

    Raises:
        ValueError, TypeError: for a p, a mask or a target that does not fit.
    """

    p: float
    mask: Mask
    target: Tensor | None
    plain_class: type[nn.Module] = nn.Linear  # what ``to_plain`` goes back to
    slot: Any = None  # this layer's place in a MixSampler

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float,
        target: Tensor | None = None,
        mask: Mask = "neuron",
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        _set_mixout(self, self.weight, p, target, mask)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, p: float, target: Tensor | None = None, mask: Mask = "neuron"
    ) -> MixLinear:
        """A MixLinear that shares ``linear``'s Parameters, hooks and attributes.

        ``target=None`` here means the pretrained weight: a frozen copy of ``linear.weight``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"MixLinear.from_linear: linear: expected an nn.Linear, got {type(linear).__name__}")
        module = shallow_copy(linear, cls)
        module.plain_class = type(linear)
        _set_mixout(module, linear.weight, p, frozen_copy(linear.weight) if target is None else target, mask)
        return module

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return F.linear(input, self.weight, self.bias)
        if self.slot is not None:
            return self.slot(input, self.weight, self.target, self.bias)
        return mix_linear(input, self.weight, self.target, self.bias, p=self.p, mask=self.mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_mixout_repr(self)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        put_target_beside_weight(self, {})


class MixConv1D(nn.Module):
    """transformers' ``Conv1D``, a linear layer whose weight lies as ``[in, out]``, with mixout on that weight.

    The neuron mask goes over the *input* features, as for a Linear: here these are the rows of the weight.
    """

    p: float
    mask: Mask
    target: Tensor | None
    weight: Tensor
    bias: Tensor
    nx: int
    nf: int
    plain_class: type[nn.Module]
    slot: Any = None

    @classmethod
    def from_conv1d(
        cls, conv: nn.Module, *, p: float, target: Tensor | None = None, mask: Mask = "neuron"
    ) -> MixConv1D:
        """A MixConv1D that shares ``conv``'s Parameters; ``target=None`` is a frozen copy of ``conv.weight``."""
        weight = conv.get_parameter("weight")
        module = shallow_copy(conv, cls)
        module.plain_class = type(conv)
        _set_mixout(module, weight, p, frozen_copy(weight) if target is None else target, mask)
        return module

    def forward(self, input: Tensor) -> Tensor:
        weight, target = self.weight.t(), None if self.target is None else self.target.t()
        if not self.training or self.p == 0:
            return F.linear(input, weight, self.bias)
        if self.slot is not None:
            return self.slot(input, weight, target, self.bias)
        return mix_linear(input, weight, target, self.bias, p=self.p, mask=self.mask)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {_mixout_repr(self)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        put_target_beside_weight(self, {})


def to_plain(module: MixLinear | MixConv1D) -> nn.Module:
    """The module without mixout, as it was: the same Parameters, hooks and attributes."""
    plain = shallow_copy(module, module.plain_class)
    plain._buffers.pop("target", None)
    plain._non_persistent_buffers_set.discard("target")
    for name in ("p", "mask", "plain_class", "slot", "target"):  # target: where host_memory.py has put it
        plain.__dict__.pop(name, None)
    return plain


def shallow_copy(module: nn.Module, cls: type[Any]) -> Any:
    """A module of class ``cls`` with the Parameters, buffers, hooks and attributes of ``module``."""
    copy: Any = object.__new__(cls)
    copy.__dict__ = dict(module.__dict__)
    # What a module registers is its own; the dicts of hooks are shared, since a hook's handle removes it from its dict.
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        copy.__dict__[name] = module.__dict__[name].copy()
    return copy


def put_target_beside_weight(module: MixLinear | MixConv1D, moved: dict[tuple[int, torch.device], Tensor]) -> None:
    """Makes a target that a sampler keeps in host memory a buffer again, on the device of the weight.

    ``moved`` has the targets that were moved before: tied layers keep sharing one.
    """
    if "target" not in module.__dict__:
        return
    target = module.__dict__.pop("target")
    if target is not None:
        key = id(target), module.weight.device
        if key not in moved:
            moved[key] = target.to(module.weight.device)
        target = moved[key]
    module.register_buffer("target", target, persistent=False)


def frozen_copy(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.preserve_format)


def _set_mixout(module: MixLinear | MixConv1D, weight: Tensor, p: float, target: Tensor | None, mask: Mask) -> None:
    checks.mixout(type(module).__name__, weight, target, p, mask)
    module.p, module.mask = p, mask
    module.register_buffer("target", target, persistent=False)


def _mixout_repr(module: MixLinear | MixConv1D) -> str:
    return f"p={module.p}, mask={module.mask!r}, target={'zero' if module.target is None else 'frozen'}"
