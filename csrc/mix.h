// The mask and the mix, written once for host and device:
//
//   word(seed, i) = lane i % 4 of Philox4x32-10(key = seed, counter = i / 4)
//   keep(i)       = word(seed, i) >= floor(p * 2^32)                       (p = 1 keeps nothing)
//   Phi_i         = keep(i) ? u_i + (w_i - u_i) * scale : u_i              scale = 1 / (1 - p)
//
// Phi is Lee, Cho & Kang (ICLR 2020), eq. 4. A dropped entry is selected, never multiplied by zero: a NaN or an
// Inf in a dropped w must not reach the output.
#pragma once

#include <cstdint>

#include "philox.h"

namespace mixout {

// floor(p * 2^32) as 64 bits: 2^32 itself (p = 1) is above every 32-bit word.
inline uint64_t keep_threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0); }

// Which decision an element (row, column) of a matrix has: mixout_kernels/draws.py knows what a kind of mask makes of
// these, and nothing below it does. A stride of 0 shares one decision along its dimension.
struct Strides {
  int64_t offset, row, column;

  MIXOUT_HOST_DEVICE uint64_t index(int64_t r, int64_t c) const {
    return static_cast<uint64_t>(offset + r * row + c * column);
  }
  MIXOUT_HOST_DEVICE Strides transposed() const { return {offset, column, row}; }
};

MIXOUT_HOST_DEVICE uint32_t mask_word(uint64_t seed, uint64_t i) {
  const Philox4x32 r = philox4x32_10(seed, i >> 2);
  const uint32_t lane = static_cast<uint32_t>(i & 3);
  const uint32_t low = lane & 1 ? r.word[1] : r.word[0], high = lane & 1 ? r.word[3] : r.word[2];
  return lane & 2 ? high : low;
}

template <typename T>
MIXOUT_HOST_DEVICE T mix(bool keep, T w, T u, T scale) {
  return keep ? u + (w - u) * scale : u;
}

}  // namespace mixout
