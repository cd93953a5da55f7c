// AVX2 for what is written over a Vector: MIXOUT_VECTOR is the attribute of functions that use it.
#pragma once

#include <cstdint>

#include "blocks.h"

#define MIXOUT_VECTOR MIXOUT_AVX2

namespace mixout::cpu {

namespace {

#define MIXOUT_INLINE static inline MIXOUT_AVX2 __attribute__((always_inline))

struct Vector {
  using Type = __m256;
  static constexpr int64_t kLanes = 8;
  // 12 accumulators: both units work at a latency of up to six cycles, and four registers are left for a and b.
  static constexpr int64_t kTileRows = 6;
  // Columns of a packed block of b: 295 KB of an L2 cache of 512 KB.
  static constexpr int64_t kColumns = 384;

  MIXOUT_INLINE Type zero() { return _mm256_setzero_ps(); }
  MIXOUT_INLINE Type broadcast(const float& value) { return _mm256_broadcast_ss(&value); }
  MIXOUT_INLINE Type load(const float* p) { return _mm256_loadu_ps(p); }
  MIXOUT_INLINE void store(float* p, Type value) { _mm256_storeu_ps(p, value); }
  MIXOUT_INLINE Type multiply_add(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  MIXOUT_INLINE Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  // Of the first n lanes; the others are zero, or stay as they are. A masked store takes dozens of cycles on AMD's CPUs.
  MIXOUT_INLINE Type load(const float* p, int64_t n) {
    return n >= kLanes ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lanes_below(n));
  }
  MIXOUT_INLINE void store(float* p, Type value, int64_t n) {
    if (n >= kLanes)
      _mm256_storeu_ps(p, value);
    else
      _mm256_maskstore_ps(p, lanes_below(n), value);
  }
  MIXOUT_INLINE __m256i lanes_below(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // to[c, r] = from[r, c] for r, c < kLanes: neighbouring lanes, pairs of lanes and halves change places in turn.
  MIXOUT_INLINE void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    __m256 row[8], pairs[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(from + r * ld_from);
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
      pairs[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
      pairs[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 4)
      for (int side = 0; side < 2; ++side) {
        const __m256 first = pairs[r + side], second = pairs[r + side + 2];
        row[r + 2 * side] = _mm256_shuffle_ps(first, second, _MM_SHUFFLE(1, 0, 1, 0));
        row[r + 2 * side + 1] = _mm256_shuffle_ps(first, second, _MM_SHUFFLE(3, 2, 3, 2));
      }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      _mm256_storeu_ps(to + r * ld_to, _mm256_permute2f128_ps(row[r], row[r + 4], 0x20));
      _mm256_storeu_ps(to + (r + 4) * ld_to, _mm256_permute2f128_ps(row[r], row[r + 4], 0x31));
    }
  }
};

}  // namespace

}  // namespace mixout::cpu
