"""The layers of a model by their names, and the decisions that each is mixed by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..draws import Draw, GradientMask, strides_of
from ..modules import MixedLayer
from ..names import TORCH_WRAPPERS, unwrapped
from .seeds import Seeds


def full_names(model: nn.Module, prefix: str) -> dict[str, MixedLayer]:
    """The mixed layers of a model by name, as they are called without torch.compile, DDP, FSDP and checkpointing."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    named = {name: m for name, m in model.named_modules() if isinstance(m, MixedLayer)}
    return {prefix + unwrapped(name, TORCH_WRAPPERS): module for name, module in named.items()}


class LayerDraw:
    """The decisions for one layer as its attributes are now, made again where one of them has changed."""

    def __init__(self, layer: MixedLayer, seeds: Seeds, mask: int) -> None:
        self.layer = layer
        self.mask = mask  # its number among the sampler's masks
        self.seed = seeds.at(layer.weight.device, mask)
        self._seeds = seeds
        self._settings: tuple[Any, ...] = ()
        self._draw: tuple[Draw, GradientMask]

    def now(self, shape: torch.Size) -> tuple[Draw, GradientMask]:
        """For a weight of this shape, ``[out, in]``, where the layer's weight is."""
        settings = self._present_settings(shape)
        if settings != self._settings:
            self._settings, self._draw = settings, self.fresh(shape, self.seed)
        return self._draw

    def fresh(self, shape: torch.Size, seed: Tensor) -> tuple[Draw, GradientMask]:
        """Without a look at what was before, for code that is traced."""
        layer = self.layer
        draw = Draw(seed, float(layer.p), strides_of(layer.mask, shape))
        return draw, GradientMask.of(layer.p, layer.grad_p, rescale=layer.rescale)

    def follow(self, device: torch.device) -> None:
        """To another device, after the layer was moved."""
        self.seed = self._seeds.at(device, self.mask)
        self._settings = ()

    def _present_settings(self, shape: torch.Size) -> tuple[Any, ...]:
        layer = self.layer
        return layer.p, layer.grad_p, layer.rescale, layer.mask, shape
