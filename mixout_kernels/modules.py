"""Drop-in layers with mixout on their weight, and the step in place from a plain layer to a mixed one and back."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Container
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .draws import Mask
from .fixed_columns import fixed_columns_linear, training_columns
from .functional import mix_linear
from .pieces import is_distributed
from .planned import LastCall

# What a mixed layer has and a plain one has not.
_SETTINGS = (
    "p", "grad_p", "rescale", "mask", "target", "block", "columns", "slot", "host_target", "gathered", "last_call"
)  # fmt: skip


class MixedLayer(nn.Module):
    """The common base of :class:`MixLinear` and :class:`MixConv1D`: their settings, their target, their forward.

    Settings may be changed at any time; a value that does not fit raises the error that the constructor would raise.

    The target is no buffer: it belongs to training alone, so DistributedDataParallel does not broadcast it, FSDP does
    not shard it (a MixSampler does), and an exported or saved program does not hold it. It follows ``.to()``,
    ``.half()``, ``copy.deepcopy`` and pickling all the same, and at the latest in forward it goes where the weight has
    gone.
    """

    p: float
    grad_p: float
    rescale: bool
    mask: Mask
    target: Tensor | None = None
    block: str | None = None  # of apply_graddrop(mask="layer"): whose decision is this layer's
    columns: Tensor | None = None  # of apply_graddrop(keep=...): the input features whose weights train, int64
    slot: Any = None  # this layer's place in a MixSampler
    host_target: bool = False  # a sampler keeps the target in host memory: it stays where it is
    gathered: Any = None  # by FSDP2: Phi, in place of the weight
    last_call: LastCall | None = None  # in training, without a sampler
    plain_class: ClassVar[type[nn.Module]]  # what ``to_plain`` goes back to
    weight: Tensor
    bias: Any  # a Parameter or None; Any, since it is Linear that says so

    @property
    def is_mixed(self) -> bool:
        """Whether it has mixout, or dropout of its weight, rather than a masked gradient alone."""
        return self.p > 0 or self.target is not None

    @property
    def has_graddrop(self) -> bool:
        """Whether the gradient of its weight is masked further than its mix does."""
        return self.grad_p > 0 or self.columns is not None

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a tensor of its shape, as ``[out, in]``: a view."""
        return tensor

    def _mixed_forward(self, input: Tensor) -> Tensor:
        weight, target = self.weight, self.target
        mixes = self.p > 0 or self.grad_p > 0
        if not self.training or not (mixes or self.columns is not None):
            return F.linear(input, self.matrix(weight), self.bias)
        if self.columns is None and self.gathered is None and not torch.compiler.is_compiling():
            last_call = self.last_call if self.slot is None else self.slot
            if last_call is not None:
                target_matrix = None if target is None else self.matrix(target)
                y = last_call.again(self, input, self.matrix(weight), target_matrix, self.bias)
                if y is not None:
                    return y
        if isinstance(input, torch.fx.Proxy):
            raise TypeError(
                f"{type(self).__name__}: input: expected a tensor, got a torch.fx.Proxy: a layer that draws masks is "
                "traced in eval mode, after remove_mixout, or by a Tracer for which it is a leaf module"
            )
        if self.gathered is not None or is_distributed(weight) or is_distributed(target):
            self._check_sharded()
            target = None  # FSDP has gathered Phi; or this rank's pieces are mixed
        elif target is not None:
            self.check_target(weight)
            if target.device != weight.device or target.dtype != weight.dtype:
                target = self._target_for(weight)
            target = self.matrix(target)
        weight = self.matrix(weight)
        if self.columns is not None:
            columns = self.columns = self.columns.to(weight.device)
            if not mixes:
                return fixed_columns_linear(input, weight, self.bias, columns)
            weight = training_columns(weight, columns)
        if self.slot is not None:
            return self.slot(input, weight, target, self.bias)
        y = mix_linear(
            input, weight, target, self.bias, p=self.p, grad_p=self.grad_p, rescale=self.rescale, mask=self.mask
        )
        if not torch.compiler.is_compiling():
            self.__dict__["last_call"] = LastCall(self, input, weight, target)
        return y

    def target_fits(self, weight: Tensor | None) -> bool:
        """Whether the target has this weight's shape. One of one dimension is FSDP1's, a piece of a flat one."""
        return self.target is None or weight is None or weight.dim() == 1 or self.target.shape == weight.shape

    def check_target(self, weight: Tensor | None) -> None:
        """Raises for a weight that was replaced by one of another shape: kernels would read past its target's end."""
        if not self.target_fits(weight):
            assert self.target is not None
            assert weight is not None
            raise ValueError(
                f"{type(self).__name__}: target: expected the weight's shape {list(weight.shape)}, got "
                f"{list(self.target.shape)}: the weight was replaced since (by resize_token_embeddings?); call "
                "remove_mixout before that, and apply_mixout after it"
            )

    def _check_sharded(self) -> None:
        whole = self.target is not None and not is_distributed(self.target)
        if self.slot is None or (self.gathered is None and whole):
            raise RuntimeError(
                f"{type(self).__name__}: a layer whose weight or target is a DTensor needs a MixSampler: make one "
                "after fully_shard or parallelize_module, or call shard_targets(model) after it"
            )
        if self.columns is not None and is_distributed(self.weight):
            raise NotImplementedError(
                f"{type(self).__name__}: apply_graddrop(keep=...) with mixout needs whole weights, got a DTensor"
            )

    def _target_for(self, weight: Tensor) -> Tensor:
        """The target after something moved or cast the weight by itself (``p.data = ...``, accelerate's hooks)."""
        assert self.target is not None
        if self.target.is_meta:
            raise RuntimeError(
                f"{type(self).__name__}: target: expected one with values, got one on the meta device: load the "
                "pretrained weights before apply_mixout, or give them as its targets=; for a sharded model call "
                "shard_targets(model, from_weights=True) once every rank has its piece of them"
            )
        if not self.host_target:
            # A target narrower than its weight was asked for; a wider one has digits that the weight has not.
            narrower = self.target.dtype.itemsize < weight.dtype.itemsize
            dtype = self.target.dtype if narrower else weight.dtype
            self.__dict__["target"] = self.target.to(device=weight.device, dtype=dtype)
        return self.target

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Not self.weight: a look at one that is parametrized computes it.
        without_values = _is_meta(self._parameters.get("weight"))
        super()._apply(fn, recurse)
        if self.target is None or self.host_target:
            return self
        with torch.no_grad():
            moved = fn(self.target)
        # to_empty(), which alone leaves the meta device, would give a target any values.
        left_meta = without_values and not _is_meta(self._parameters.get("weight"))
        emptied = left_meta or (self.target.is_meta and not moved.is_meta)
        if not emptied:
            self.__dict__["target"] = moved
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            _CHECKS[name](self, value)
        super().__setattr__(name, _as_tensor(value) if name == "target" else value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("host_target", None)  # a copy has no sampler
        self.__dict__.pop("gathered", None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self) is MixLinear or type(self) is not mixed_class(self.plain_class):
            return reduced
        # Its class was made here and has no place to be imported from.
        return _new_of, (self.plain_class,), *reduced[2:]

    def _settings_repr(self) -> str:
        grad_p = f", grad_p={self.grad_p}" if self.grad_p else ""
        grad_p += "" if self.columns is None else f", {len(self.columns)} columns train"
        target = "zero" if self.target is None else "frozen"
        return f"p={self.p}{grad_p}, mask={self.mask!r}, target={target}"


def _check_probability(name: str) -> Callable[[MixedLayer, Any], None]:
    return lambda layer, value: checks.probability(type(layer).__name__, name, value)


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def _as_tensor(target: Any) -> Any:
    """Torch registers what is a Parameter, and a target is none of the model's."""
    return target.detach() if isinstance(target, nn.Parameter) else target


def _check_target(layer: MixedLayer, target: Tensor | None) -> None:
    # On meta, since the devices may differ: forward moves a target to its weight.
    if target is not None:
        target = target.to("meta") if isinstance(target, Tensor) else target
        checks.weight_and_target(type(layer).__name__, layer.weight.to("meta"), target)


_CHECKS: dict[str, Callable[[MixedLayer, Any], None]] = {
    "p": _check_probability("p"),
    "grad_p": _check_probability("grad_p"),
    "rescale": lambda layer, value: checks.flag(type(layer).__name__, "rescale", value),
    "mask": lambda layer, value: checks.kind(type(layer).__name__, value),
    "target": _check_target,
}


class MixLinear(MixedLayer, nn.Linear):
    """An ``nn.Linear`` whose weight is mixed with a frozen target while training.

    ``y = x Phi^T + b`` with ``Phi = u + M * (w - u) / (1 - p)`` (Lee, Cho & Kang, ICLR 2020, eq. 4); see
    :func:`mixout_kernels.mix_linear`. In eval mode, and where p and grad_p are 0, it is an ``nn.Linear``, bit for bit.

    The state_dict has the keys of ``nn.Linear``, so checkpoints load both ways: the target is an attribute, which
    follows ``.to()``, ``.half()``, ``copy.deepcopy`` and pickling of the module.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        p: the mix probability in [0, 1].
        target: u, ``[out_features, in_features]``; it is not copied. None is zero: dropout of the input features or
            dropconnect.
        mask: "neuron", one decision per input feature, "weight", one per element, or another kind of
            :func:`mixout_kernels.mix_linear`.
        grad_p: the probability in [0, 1] that an entry which the mix kept gets no gradient.
        rescale: False leaves the factor ``1 / (1 - grad_p)`` out of dw.

    Raises:
        ValueError, TypeError: for a setting or a target that does not fit, here and wherever one is set later.
    """

    plain_class = nn.Linear

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
        grad_p: float = 0.0,
        rescale: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        _set_mixout(self, p=p, target=target, mask=mask, grad_p=grad_p, rescale=rescale)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        p: float,
        target: Tensor | None = None,
        mask: Mask = "neuron",
        grad_p: float = 0.0,
        rescale: bool = True,
    ) -> MixLinear:
        """A MixLinear that shares ``linear``'s Parameters, hooks and attributes.

        ``target=None`` here means the pretrained weight: a frozen copy of ``linear.weight``. Of a subclass of Linear
        the result is a MixLinear and an instance of that subclass, with what it adds.

        Raises:
            TypeError: if ``linear`` is no ``nn.Linear``, or its class has a forward of its own.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"MixLinear.from_linear: linear: expected an nn.Linear, got {type(linear).__name__}")
        if type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"MixLinear.from_linear: linear: expected the forward of nn.Linear, got a {type(linear).__name__}, "
                "which has one of its own"
            )
        module: MixLinear = _shallow_copy(linear)
        target = frozen_copy(linear.weight) if target is None else target
        to_mixed(module, p=p, target=target, mask=mask, grad_p=grad_p, rescale=rescale)
        return module

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, MixedLayer):
            return type(self).forward(self, input)  # bound by a wrapper that has outlived remove_mixout
        return self._mixed_forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._settings_repr()}"


class MixConv1D(MixedLayer):
    """transformers' ``Conv1D``, a linear layer whose weight lies as ``[in, out]``, with mixout on that weight.

    The neuron mask goes over the *input* features, as for a Linear: here these are the rows of the weight. An instance
    is also one of transformers' own ``Conv1D``.
    """

    nx: int
    nf: int

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Module,
        *,
        p: float,
        target: Tensor | None = None,
        mask: Mask = "neuron",
        grad_p: float = 0.0,
        rescale: bool = True,
    ) -> MixConv1D:
        """A MixConv1D that shares ``conv``'s Parameters; ``target=None`` is a frozen copy of ``conv.weight``.

        Raises:
            TypeError: if ``conv`` is no ``Conv1D`` of transformers.
        """
        if not is_conv1d(conv):
            raise TypeError(
                f"MixConv1D.from_conv1d: conv: expected a Conv1D of transformers, got {type(conv).__name__}"
            )
        module: MixConv1D = _shallow_copy(conv)
        target = frozen_copy(conv.get_parameter("weight")) if target is None else target
        to_mixed(module, p=p, target=target, mask=mask, grad_p=grad_p, rescale=rescale)
        return module

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.t()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, MixedLayer):
            return type(self).forward(self, x)  # bound by a wrapper that has outlived remove_mixout
        return self._mixed_forward(x)

    __repr__ = nn.Module.__repr__  # Conv1D's own says nothing of what is added here

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self._settings_repr()}"


def is_conv1d(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


class TargetKeeper(Protocol):
    def keep_targets(self, layers: Container[nn.Module]) -> None: ...


# Who goes on with the targets of layers that stop being mixed. A reference to a target that is taken earlier would keep
# it in memory when a sampler shards it, or moves it to the host.
target_keepers: weakref.WeakSet[TargetKeeper] = weakref.WeakSet()

_mixed_classes: dict[type, type[MixedLayer]] = {nn.Linear: MixLinear}


def mixed_class(plain: type[nn.Module]) -> type[MixedLayer]:
    """The class of ``plain``'s layers while they are mixed: MixLinear, or one, made once, that is also a ``plain``."""
    if plain not in _mixed_classes:
        base = MixLinear if issubclass(plain, nn.Linear) else MixConv1D
        own = {"plain_class": plain, "__module__": base.__module__}
        _mixed_classes[plain] = type(f"Mix{plain.__name__}", (base, plain), own)
    return _mixed_classes[plain]


def taken_names(module: nn.Module) -> list[str]:
    """Attributes of a plain layer's own under names that a mixed layer needs, and ``to_plain`` takes away."""
    return [name for name in _SETTINGS if name in module.__dict__]


def to_mixed(
    module: nn.Module,
    *,
    p: float,
    target: Tensor | None,
    mask: Mask = "neuron",
    grad_p: float = 0.0,
    rescale: bool = True,
) -> None:
    """Gives a plain layer mixout, in place: its class changes; the object, its Parameters and its hooks stay."""
    plain, mixed = type(module), mixed_class(type(module))
    if taken := taken_names(module):
        raise TypeError(
            f"{mixed.__name__}: linear: expected a layer without attributes named as its settings, got a "
            f"{plain.__name__} with {', '.join(taken)}"
        )
    weight: Any = module.weight
    checks.mixout(mixed.__name__, weight, _beside(weight, target), p, mask, grad_p, rescale)
    _rebind(module, plain, mixed)
    module.__class__ = mixed
    _set_mixout(module, p=p, target=target, mask=mask, grad_p=grad_p, rescale=rescale)  # type: ignore[arg-type]


def to_plain(module: MixedLayer) -> None:
    """Takes mixout away again, in place: the layer is what it was, with its trained weight."""
    mixed, plain = type(module), _plain_class_of(type(module))
    _rebind(module, mixed, plain)
    module.__class__ = plain  # type: ignore[assignment]
    for name in _SETTINGS:
        module.__dict__.pop(name, None)


def forward_reaches_class(module: nn.Module) -> bool:
    """Whether a call ends in the forward of the module's class, now and after that class was changed."""
    own = module.__dict__
    return "forward" not in own or any(_is_forward(own.get(name), module, type(module)) for name in _entries(own))


def _entries(own: dict[str, Any]) -> tuple[str, ...]:
    # accelerate's hooks: forward is a wrapper, which looks up _old_forward in each call.
    return ("_old_forward",) if "_hf_hook" in own else ("forward",)


def _is_forward(method: Any, module: nn.Module, cls: type[nn.Module]) -> bool:
    return isinstance(method, types.MethodType) and method.__self__ is module and method.__func__ is cls.forward


def _rebind(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    for name, value in list(module.__dict__.items()):
        if _is_forward(value, module, old):
            module.__dict__[name] = types.MethodType(new.forward, module)


def _plain_class_of(mixed: type[MixedLayer]) -> type[nn.Module]:
    """Also under a class that torch has laid over the mixed one since: a parametrization's, or FSDP's."""
    if not mixed.__module__.startswith("torch."):
        return mixed.plain_class
    bases = tuple(_plain_class_of(base) if issubclass(base, MixedLayer) else base for base in mixed.__bases__)
    own = {name: value for name, value in vars(mixed).items() if name not in ("__dict__", "__weakref__")}
    name = mixed.__name__.replace(mixed.__bases__[-1].__name__, bases[-1].__name__)
    return type(name, bases, own)


def _new_of(plain: type[nn.Module]) -> MixedLayer:
    cls = mixed_class(plain)
    return cls.__new__(cls)


def _shallow_copy(module: nn.Module) -> Any:
    """A module with the Parameters, buffers, hooks and attributes of ``module``."""
    copy: Any = object.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    # What a module registers is its own; the dicts of hooks are shared, since a hook's handle removes it from its dict.
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        copy.__dict__[name] = module.__dict__[name].copy()
    return copy


def frozen_copy(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.preserve_format)


def _beside(weight: Tensor, target: Tensor | None) -> Tensor | None:
    """For checks: beside a weight on the meta device, which has no values yet, a target may have some elsewhere."""
    return target.to("meta") if isinstance(target, Tensor) and weight.is_meta else target


def _set_mixout(
    module: MixedLayer, *, p: float, target: Tensor | None, mask: Mask, grad_p: float, rescale: bool
) -> None:
    checks.mixout(type(module).__name__, module.weight, _beside(module.weight, target), p, mask, grad_p, rescale)
    module.__dict__.update(p=p, target=_as_tensor(target), mask=mask, grad_p=grad_p, rescale=rescale)
