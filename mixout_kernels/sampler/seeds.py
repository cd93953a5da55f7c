"""The seeds of a model's masks: a hash of the sampler's seed, of the mask's name and of the number of the draw.

    start(mask)    = mix(mix(seed + GOLDEN) ^ name)            on the host, once
    key(mask, k)   = mix(start(mask) + (k + 1) * GOLDEN)       on the device; k = optimizer steps // every

``mix`` is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), ``name`` 64 bits of BLAKE2b of the full name
of the layer, so that key(mask, k) is the k-th number of a SplitMix64 generator of the mask's own. Seeds in a row,
layers of two pipeline stages and draws in a row share no masks; the number and the order of layers do not matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..draws import Draw

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, SplitMix64's increment
# mix: z = (z ^ z >>> shift) * factor, for each of these, and a last z ^ z >>> 31.
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
MASK_64 = 2**64 - 1


def mix(z: int) -> int:
    """SplitMix64's finaliser, a bijection of 64 bits in which every bit of the input changes half of the output's."""
    for shift, factor in ROUNDS:
        z = ((z ^ z >> shift) * factor) & MASK_64
    return z ^ z >> LAST_SHIFT


def start_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return mix(mix((seed + GOLDEN) & MASK_64) ^ int.from_bytes(digest, "little"))


def key_of(seed: int, name: str, draw: int) -> int:
    """The Philox key of a mask as a signed 64-bit int, on the host; the device computes the same for all at once."""
    return signed(mix((start_of(seed, name) + (draw + 1) * GOLDEN) & MASK_64))


def signed(number: int) -> int:
    """64 bits as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


def is_64_bits(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63


class Seeds:
    """The keys of all masks of a sampler, and the optimizer steps that they belong to.

    A counter and keys on each device: a model may lie on several, and nothing is copied between them in a step.
    """

    def __init__(self, seed: int, every: float, names: Sequence[str]) -> None:
        self.seed = seed
        self.every = every
        self.names = tuple(names)
        self.draws = 0  # how often keys were drawn, for what must not outlive a draw
        self._host_step = 0  # as far as the host knows: it counts a step that GradScaler skips on a device
        self._dropped: dict[tuple[int, float], bool] = {}  # of the present draw
        self._devices: dict[torch.device, _DeviceSeeds] = {}

    @property
    def step(self) -> int:
        """Optimizer steps so far (reads the device)."""
        return int(next(iter(self._devices.values())).step.item())

    def at(self, device: torch.device, number: int) -> Tensor:
        """The key of mask ``number`` on this device: one element, which every draw writes anew."""
        if device not in self._devices:
            step = next(iter(self._devices.values())).step if self._devices else torch.zeros(1, dtype=torch.int64)
            self._devices[device] = _DeviceSeeds(step.to(device), len(self.names))
            self._devices[device].restart(self._starts())
            self._devices[device].draw(self.every)
        return self._devices[device].keys[number : number + 1]

    def drops(self, number: int, p: float) -> bool:
        """The decision of a mask that has one alone, word 0 of its key, without a look at a device."""
        if (number, p) not in self._dropped:
            draw = 0 if self.every == math.inf else self._host_step // int(self.every)
            key = torch.tensor([key_of(self.seed, self.names[number], draw)])
            self._dropped[number, p] = not reference.decisions(Draw(key, p, (0,)), [1]).item()
        return self._dropped[number, p]

    def keep(self, devices: Iterable[torch.device]) -> None:
        """Drops the counters of all other devices."""
        used = set(devices)
        self._devices = {device: seeds for device, seeds in self._devices.items() if device in used}

    def advance(self, steps: int | Tensor) -> None:
        for device, seeds in self._devices.items():
            seeds.step.add_(steps.to(device) if isinstance(steps, Tensor) else steps)
        self._host_step += 1 if isinstance(steps, Tensor) and steps.device.type != "cpu" else int(steps)
        self._draw()

    def restart(self, seed: int, step: int) -> None:
        self.seed = seed
        for seeds in self._devices.values():
            seeds.restart(self._starts())
            seeds.step.fill_(step)
        self._host_step = step
        self._draw()

    def _draw(self) -> None:
        for seeds in self._devices.values():
            seeds.draw(self.every)
        self.draws += 1
        self._dropped.clear()

    def _starts(self) -> list[int]:
        return [signed(start_of(self.seed, name) + GOLDEN) for name in self.names]


class _DeviceSeeds:
    """The counter of steps and the keys on one device.

    Drawn in place by a fixed sequence of small operations, so that in a captured CUDA graph every replay draws anew.
    """

    def __init__(self, step: Tensor, masks: int) -> None:
        self.step = step
        # 16 bytes apart: Triton compiles a kernel once more for pointers that are not aligned so.
        self.keys = torch.empty(2 * masks, dtype=torch.int64, device=step.device)[::2]
        self._starts, self._z, self._shifted = (torch.empty_like(step).repeat(masks) for _ in range(3))

    def restart(self, starts: list[int]) -> None:
        self._starts.copy_(torch.tensor(starts, dtype=torch.int64))

    def draw(self, every: float) -> None:
        z, shifted = self._z, self._shifted
        if every == math.inf:
            z.copy_(self._starts)
        else:
            draw = self.step if every == 1 else self.step // int(every)
            torch.add(self._starts, draw, alpha=signed(GOLDEN), out=z)  # int64 wraps around, as the finaliser wants it
        for shift, factor in ROUNDS:
            z.bitwise_xor_(_logical_shift(z, shift, shifted)).mul_(signed(factor))
        torch.bitwise_xor(z, _logical_shift(z, LAST_SHIFT, shifted), out=self.keys)


def _logical_shift(z: Tensor, shift: int, out: Tensor) -> Tensor:
    """z >>> shift: int64's own shift repeats the sign, which the mask takes away again."""
    return torch.bitwise_right_shift(z, shift, out=out).bitwise_and_(2 ** (64 - shift) - 1)
