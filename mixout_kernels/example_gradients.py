"""The squared gradient of each example's loss, from one forward and one backward of a whole batch.

A matrix W that is used on T positions of example n has the gradient

    G_n = sum_t left[n, t] (x) right[n, t]        a Linear: left is the gradient of its output, right its input
                                                  an Embedding: left is the one-hot row of the token

so autograd need not make it: hooks keep left and right, and while a module runs its parameters do not require grad.
``squared_gradients`` makes G_n of them. A parameter that is used several times (tied, or a layer that is called again)
is summed over its uses before squaring.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import MixConv1D, MixLinear, is_conv1d
from .squared_gradients import Use, add_squares, sum_of_norms


class ExampleGradients:
    """Sums over examples of the squared gradient of each parameter, or of its squared norm if ``norms``.

    ``squares`` has them by parameter; other examples are added by :meth:`add`.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[nn.Parameter, str], *, norms: bool) -> None:
        self._names = parameters
        self._norms = norms
        self._modules = {m: name for name, m in model.named_modules() if _kind(m) and self._wanted(m)}
        self._checked = False
        self.squares = {
            parameter: torch.zeros(
                (() if norms else parameter.shape), dtype=_sum_dtype(parameter), device=parameter.device
            )
            for parameter in parameters
        }

    def _wanted(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module._parameters.values() if p is not None and p in self._names]

    def add_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Adds one example whose gradients autograd has made."""
        for parameter, gradient in gradients.items():
            square = gradient.to(self.squares[parameter].dtype).square()
            self.squares[parameter] += square.sum() if self._norms else square

    def add(self, losses: Callable[[], Tensor], examples: int) -> None:
        """Adds the examples of one batch; ``losses`` runs the model and returns one loss for each of them."""
        self._check_parameters(examples)
        run = _Run(self, examples)
        with run.watch(self._modules):
            values = losses()
            reached = [run.anchor, *self._names]
            if not self._checked:
                # Whatever reaches the first loss must come from the first example. Else some module's output does not
                # have the examples in its first dimension, although its size fits.
                run.checking = True
                torch.autograd.grad(values[0], reached, retain_graph=True, allow_unused=True)
                run.checking, self._checked = False, True
            _, *outside = torch.autograd.grad(values.sum(), reached, allow_unused=True)
        for parameter, gradient in zip(self._names, outside, strict=True):
            if gradient is not None:
                raise _no_example_gradient(
                    f"{self._names[parameter]!r}, which is read outside of the forward of its module"
                )
        run.finish()

    def _check_parameters(self, examples: int) -> None:
        reached = {parameter for module in self._modules for parameter in self._wanted(module)}
        for parameter, name in self._names.items():
            if parameter not in reached:
                raise _no_example_gradient(f"{name!r} in a batch of {examples} examples")


class _Run:
    """One batch: what the uses of each parameter keep until all of them have their gradients."""

    def __init__(self, owner: ExampleGradients, examples: int) -> None:
        self.owner = owner
        self.examples = examples
        self.checking = False
        # Every output that is watched hangs on it: so all are in the graph although no parameter is.
        device = next(iter(owner.squares.values())).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.uses: dict[nn.Parameter, list[Use]] = {}
        self.vectors: dict[nn.Parameter, Tensor] = {}  # [n, size]: biases, and scales of a normalisation
        self.waiting: Counter[nn.Parameter] = Counter()

    @contextmanager
    def watch(self, modules: Mapping[nn.Module, str]) -> Iterator[None]:
        frozen = {module: self.owner._wanted(module) for module in modules}

        def freeze(module: nn.Module, *_: Any) -> None:
            for parameter in frozen[module]:
                parameter.requires_grad_(False)

        def thaw(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
            for parameter in frozen[module]:
                parameter.requires_grad_(True)
            if not torch.is_grad_enabled():
                return output
            return self._watched(module, modules[module], args[0] if args else next(iter(kwargs.values())), output)

        handles = [module.register_forward_pre_hook(freeze) for module in modules]
        handles += [module.register_forward_hook(thaw, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in itertools.chain(*frozen.values()):
                parameter.requires_grad_(True)

    def _watched(self, module: nn.Module, name: str, input: Tensor, output: Tensor) -> Tensor:
        kind = _kind(module)
        assert kind is not None
        weight = module.get_parameter("weight")
        if output.shape[0] != self.examples:
            # One for all examples, as positions often are: each example gets a gradient of its own.
            if output.shape[0] == 1:
                output = output.expand(self.examples, *output.shape[1:])
                input = input.expand(self.examples, *input.shape[1:])
            elif isinstance(module, nn.Embedding) and input.dim() == 1:
                output = output.expand(self.examples, *output.shape)
                input = input.expand(self.examples, *input.shape)
            else:
                raise _no_example_gradient(
                    f"{name!r}, whose output {list(output.shape)} does not begin with the {self.examples} examples"
                )
        if weight in self.owner._names:
            self.waiting[weight] += 1
        input = input.detach()

        def record(gradient: Tensor) -> None:
            if self.checking:
                if gradient[1:].any():
                    raise _no_example_gradient(f"{name!r}, whose output mixes the examples of a batch")
                return
            self._record(module, kind(module, _widened(input), _widened(gradient), self.examples))

        return _Watch.apply(output, self.anchor, record)

    def _record(self, module: nn.Module, found: tuple[Use | Tensor, Tensor]) -> None:
        of_weight, of_bias = found
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        names = self.owner._names
        if bias is not None and bias in names:
            self._add_vector(bias, of_bias)
        if weight is None or weight not in names:
            return
        self.waiting[weight] -= 1
        if isinstance(of_weight, Use):
            self.uses.setdefault(weight, []).append(of_weight)
            if self.waiting[weight] == 0:
                self._finish_matrix(weight)
        else:
            self._add_vector(weight, of_weight)

    def _add_vector(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        self.vectors[parameter] = self.vectors[parameter] + gradients if parameter in self.vectors else gradients

    def _finish_matrix(self, parameter: nn.Parameter) -> None:
        total, uses = self.owner.squares[parameter], self.uses.pop(parameter)
        if self.owner._norms:
            total += sum_of_norms(uses, *parameter.shape)
        else:
            add_squares(total, uses)

    def finish(self) -> None:
        for parameter in list(self.uses):  # some uses had no part in the losses
            self._finish_matrix(parameter)
        for parameter, gradients in self.vectors.items():
            squares = gradients.square()
            total = self.owner.squares[parameter]
            total += squares.sum() if self.owner._norms else squares.sum(0).view_as(parameter)


class _Watch(torch.autograd.Function):
    """The identity; ``record`` is called with the gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, record: Callable[[Tensor], None]) -> Tensor:
        ctx.record = record
        # No view as autograd counts them: one that a Function returns may not be written to by a ReLU(inplace=True).
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.record(gradient)
        return gradient, None, None


def _no_example_gradient(found: str) -> TypeError:
    return TypeError(
        "fisher: model: expected parameters that are read by the forward of a Linear, Conv1D, Embedding, LayerNorm or "
        f"RMSNorm, for each example by itself; got {found}. Give batches of one example, or leave it out by include= "
        "or exclude="
    )


# What a module of each kind makes of its input and the gradient of its output, both with n examples first: the Use of
# its weight, or the weight's gradients [n, size], and those of its bias.
_Kind = Callable[[Any, Tensor, Tensor, int], tuple[Use | Tensor, Tensor]]


def _of_linear(module: nn.Module, input: Tensor, gradient: Tensor, n: int) -> tuple[Use, Tensor]:
    gradient = _positions(gradient, n)
    return Use(gradient, _positions(input, n)), gradient.sum(1)


def _of_conv1d(module: nn.Module, input: Tensor, gradient: Tensor, n: int) -> tuple[Use, Tensor]:
    gradient = _positions(gradient, n)
    return Use(_positions(input, n), gradient), gradient.sum(1)


def _of_embedding(module: nn.Embedding, input: Tensor, gradient: Tensor, n: int) -> tuple[Use, Tensor]:
    tokens, gradient = input.reshape(n, -1).long(), _positions(gradient, n)
    if module.padding_idx is not None:  # a row without a gradient
        gradient = gradient.masked_fill((tokens == module.padding_idx).unsqueeze(2), 0)
    return Use(tokens, gradient), gradient


def _of_normalisation(module: nn.Module, input: Tensor, gradient: Tensor, n: int) -> tuple[Tensor, Tensor]:
    normalised = _normalised(module, input)
    size = module.get_parameter("weight").numel()
    return (gradient * normalised).reshape(n, -1, size).sum(1), gradient.reshape(n, -1, size).sum(1)


def _kind(module: nn.Module) -> _Kind | None:
    """How this module reads its parameters, or None. By its forward: a subclass may read them in another way."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, MixLinear.forward):
        return _of_linear
    if is_conv1d(module) or forward is MixConv1D.forward:
        return _of_conv1d
    if forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return _of_embedding
    if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and isinstance(
        module._parameters.get("weight"), Tensor
    ):
        return _of_normalisation
    return None


def _normalised(module: Any, input: Tensor) -> Tensor:
    """The input, normalised: d output / d weight."""
    if type(module) is nn.LayerNorm:
        return F.layer_norm(input, module.normalized_shape, None, None, module.eps)
    # Every such module is affine in its weight, element by element, whatever its form (some add 1 to the weight), so
    # the derivative is a difference. Its hooks must not be called again: `forward`, not the module.
    parameters = module._parameters

    def output(weight: float) -> Tensor:
        module._parameters = {**parameters, "weight": torch.full_like(parameters["weight"], weight)}
        try:
            with torch.no_grad():
                return module.forward(input)
        finally:
            module._parameters = parameters

    return output(1.0) - output(0.0)


def _positions(t: Tensor, n: int) -> Tensor:
    return t.reshape(n, -1, t.shape[-1])


def _widened(t: Tensor) -> Tensor:
    return t.to(_sum_dtype(t)) if t.is_floating_point() else t


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
