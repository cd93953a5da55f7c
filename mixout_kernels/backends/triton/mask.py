"""The mask inside Triton kernels: regenerated from the seed wherever it is needed, never stored.

    word(seed, i) = lane i % 4 of Philox4x32-10(key = seed, counter = i // 4)
    keep(i)       = word(seed, i) >= floor(p * 2^32)

One Philox call decides four neighbouring indices, so runs of indices are generated a quarter as wide and the four words
of a call joined side by side; ``keep_each`` is for indices that do not come in such runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

_KEEP_BLOCK = 1024
_COUNT_BLOCK = tl.constexpr(1024)


def threshold_argument(p: float) -> int:
    """floor(p * 2^32) for p < 1, wrapped to int32: Triton then sees one type for every p and compiles once."""
    threshold = math.floor(p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold


@triton.jit
def _philox4x32_10(seed, counter):
    """The four words for each 64-bit counter. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Written out, because each product of ``tl.philox`` compiles to a high and a low multiply. A 64-bit product is one
    instruction: 19 IMAD.WIDE on sm_90 for the ten rounds, in place of 17 IMAD.HI and as many IMAD.
    """
    key_lo = seed.to(tl.uint64).to(tl.uint32)
    key_hi = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    counter = counter.to(tl.uint64)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key_lo
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key_hi
        c3 = a.to(tl.uint32)
        # In 64 bits and cut off: the interpreter would warn of an overflow of 32.
        key_lo = (key_lo.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key_hi = (key_hi.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _keep_quads(seed, threshold, counter):
    """[..., 2, 2] decisions per counter; flattened, they are in the order of their indices."""
    bound = threshold.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = _philox4x32_10(seed, counter)
    return tl.join(tl.join(w0 >= bound, w2 >= bound), tl.join(w1 >= bound, w3 >= bound))


@triton.jit
def keep_line(seed, threshold, first, WIDTH: tl.constexpr):
    """[WIDTH] decisions for the indices first, first + 1, ...; ``first`` a multiple of 4."""
    return _keep_quads(seed, threshold, first // 4 + tl.arange(0, WIDTH // 4)).reshape(WIDTH)


@triton.jit
def keep_rows(seed, threshold, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] decisions, in each row for the indices first[row], first[row] + 1, ...; multiples of 4."""
    counter = (first // 4)[:, None] + tl.arange(0, WIDTH // 4)[None, :]
    return _keep_quads(seed, threshold, counter).reshape(ROWS, WIDTH)


@triton.jit
def keep_each(seed, threshold, index):
    """The decision for each index, in the shape of ``index``."""
    w0, w1, w2, w3 = _philox4x32_10(seed, index // 4)
    low = tl.where(index % 2 == 0, w0, w1)
    high = tl.where(index % 2 == 0, w2, w3)
    return tl.where(index % 4 < 2, low, high) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def count_kept(seed, threshold, end):
    """How many of the indices 0 .. end - 1 are kept; ``end`` a multiple of 4."""
    bound = threshold.to(tl.uint32, bitcast=True)
    count = tl.zeros((_COUNT_BLOCK // 4,), tl.int32)
    for start in range(0, end // 4, _COUNT_BLOCK // 4):
        counter = start + tl.arange(0, _COUNT_BLOCK // 4)
        w0, w1, w2, w3 = _philox4x32_10(seed, counter)
        kept = (w0 >= bound).to(tl.int32) + (w1 >= bound) + (w2 >= bound) + (w3 >= bound)
        count += tl.where(counter < end // 4, kept, 0)
    return tl.sum(count)


@triton.jit(do_not_specialize=["threshold"])
def _keep_mask_kernel(keep_ptr, seed_ptr, threshold, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    keep = keep_line(tl.load(seed_ptr), threshold, first, BLOCK)
    tl.store(keep_ptr + index, keep, mask=index < count)


def keep_mask(seed: Tensor, p: float, shape: Sequence[int], mask: str) -> Tensor:
    if mask == "neuron" and len(shape) > 1:
        shape = (shape[1],)
    if p == 1:
        return torch.zeros(shape, dtype=torch.bool, device=seed.device)
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    if keep.numel():
        programs = triton.cdiv(keep.numel(), _KEEP_BLOCK)
        launch(_keep_mask_kernel, programs, keep, seed, threshold_argument(p), keep.numel(), BLOCK=_KEEP_BLOCK)
    return keep
