// How a product is cut into blocks, and 16 x 16 words turned: what both products share.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MIXOUT_AVX2 __attribute__((target("avx2,fma")))
#define MIXOUT_AVX512 __attribute__((target("avx512f")))
#endif

namespace mixout::cpu {

struct Block {
  int64_t first, size;
};

// The part of [0, n) of number `part` of `parts`, in whole multiples of `unit`.
inline Block part_of(int64_t n, int64_t part, int64_t parts, int64_t unit) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t first = std::min(n, units * part / parts * unit), end = std::min(n, units * (part + 1) / parts * unit);
  return {first, end - first};
}

// The most units in one of these parts.
inline int64_t tiles_of(int64_t n, int64_t parts, int64_t unit) {
  const int64_t units = (n + unit - 1) / unit;
  return (units + parts - 1) / parts;
}

#ifdef MIXOUT_AVX512

inline MIXOUT_AVX512 __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// row[c][r] of 32-bit lanes becomes row[r][c]: in round s, lanes whose number has bit s change places with the row's
// partner.
inline __attribute__((target("avx512f"), always_inline)) void transpose(__m512 (&row)[16]) {
  __m512 turned[16];
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int bit = 1; bit < 16; bit *= 2) {
    const __mmask16 set = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
    // Lane j of a row, and lane j -+ bit of its partner (numbers from 16 on are the second operand's).
    const __m512i first = _mm512_mask_add_epi32(lane, set, lane, _mm512_set1_epi32(16 - bit));
    const __m512i second = _mm512_mask_add_epi32(
        _mm512_add_epi32(lane, _mm512_set1_epi32(bit)), set, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      turned[r] = r & bit ? _mm512_permutex2var_ps(row[r - bit], second, row[r])
                          : _mm512_permutex2var_ps(row[r], first, row[r + bit]);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) row[r] = turned[r];
  }
}

// to[c, r] = from[r, c] for r, c < 16, where a step is that of a row in words of 32 bits.
inline MIXOUT_AVX512 void transpose_16x16(const void* from, int64_t ld_from, void* to, int64_t ld_to) {
  __m512 row[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) row[r] = _mm512_loadu_ps(static_cast<const float*>(from) + r * ld_from);
  transpose(row);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_storeu_ps(static_cast<float*>(to) + r * ld_to, row[r]);
}

#endif

}  // namespace mixout::cpu
