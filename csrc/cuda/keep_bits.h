// Mask bits for threads that own a few neighbouring entries.
#pragma once

#include "../mix.h"
#include "intrinsics.h"

namespace mixout::cuda {

// Bit k is keep(first + k), k < N. One Philox call decides four entries; `first` off a multiple of four costs one more.
template <int N>
MIXOUT_DEVICE uint32_t keep_bits(uint64_t seed, uint64_t first, uint32_t threshold) {
  static_assert(N % 4 == 0 && N <= 28, "the bits before shifting must fit 32");
  const uint32_t offset = static_cast<uint32_t>(first & 3);
  uint32_t bits = 0;
#pragma unroll
  for (int group = 0; group <= N / 4; ++group) {
    if (group == N / 4 && offset == 0) continue;
    const Philox4x32 r = philox4x32_10(seed, (first >> 2) + group);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane)
      bits |= static_cast<uint32_t>(r.word[lane] >= threshold) << (4 * group + lane);
  }
  return bits >> offset & ((1u << N) - 1);
}

// The same for decisions `stride` apart: bit k is keep(first + k * stride).
template <int N>
MIXOUT_DEVICE uint32_t keep_bits(uint64_t seed, uint64_t first, int64_t stride, uint32_t threshold) {
  if (stride == 1) return keep_bits<N>(seed, first, threshold);
  uint32_t bits = 0;
#pragma unroll 1
  for (int k = 0; k < N; ++k)
    bits |= static_cast<uint32_t>(mask_word(seed, first + k * stride) >= threshold) << k;
  return bits;
}

MIXOUT_DEVICE uint64_t seed_value(const int64_t* seed) { return static_cast<uint64_t>(*seed); }

}  // namespace mixout::cuda
