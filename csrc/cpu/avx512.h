// AVX-512 for what is written over a Vector: MIXOUT_VECTOR is the attribute of functions that use it.
#pragma once

#include <cstdint>

#include "blocks.h"

#define MIXOUT_VECTOR MIXOUT_AVX512

namespace mixout::cpu {

namespace {

#define MIXOUT_INLINE static inline MIXOUT_AVX512 __attribute__((always_inline))

struct Vector {
  using Type = __m512;
  static constexpr int64_t kLanes = 16;
  // 28 accumulators, which leaves four registers for a and b. One fused multiply-add in 28 waits for nothing, so both
  // units are busy: with a in L1, 99 % of their peak was measured on Zen 5 with b there too, on Zen 4 with b in L2.
  static constexpr int64_t kTileRows = 14;
  // Columns of a packed block of b: 590 KB of an L2 cache of 1 MB.
  static constexpr int64_t kColumns = 768;

  MIXOUT_INLINE Type zero() { return _mm512_setzero_ps(); }
  MIXOUT_INLINE Type broadcast(const float& value) { return _mm512_set1_ps(value); }
  MIXOUT_INLINE Type load(const float* p) { return _mm512_loadu_ps(p); }
  MIXOUT_INLINE void store(float* p, Type value) { _mm512_storeu_ps(p, value); }
  MIXOUT_INLINE Type multiply_add(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  MIXOUT_INLINE Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  // Of the first n lanes; the others are zero, or stay as they are.
  MIXOUT_INLINE Type load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
  MIXOUT_INLINE void store(float* p, Type value, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), value); }
  // to[c, r] = from[r, c] for r, c < kLanes.
  MIXOUT_INLINE void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    transpose_16x16(from, ld_from, to, ld_to);
  }
};

}  // namespace

}  // namespace mixout::cpu
