// The float32 tile of c in registers, and how threads share a product of such tiles: for every product that sums float32
// in these, whatever it was packed from.
#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>

#include "blocks.h"
#include "rows.h"

#ifdef MIXOUT_AVX512

namespace mixout::cpu {

// Of c in registers: 28 accumulators of 16, which leaves four registers for a and b. One fused multiply-add in 28 waits
// for nothing, so both units are busy: 99 % of their peak was measured on Zen 5 with a and b in L1.
constexpr int64_t kTileRows = 14, kTileColumns = 32;
// c [kRows, n <= 32] = a b over `depth`, plus c itself, or else `bias` if there is one.
template <int kRows>
MIXOUT_AVX512 void tile(
    int64_t depth, const Strided<float>& a, const float* b, int64_t ldb, const float* bias, bool accumulate, float* c,
    int64_t ldc, int64_t n) {
  const __mmask16 low = lanes(n), high = lanes(n - 16);
  __m512 sum[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    __builtin_prefetch(c + r * ldc, 1);  // for the end: the products take longer than any cache
    __builtin_prefetch(c + r * ldc + kTileColumns - 1, 1);
  }
  // Three rows to a pointer: one address register and one stride reach them all.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* left[kPointers];
  for (int i = 0; i < kPointers; ++i) left[i] = a.data + 3 * i * a.row;
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    const __m512 b0 = _mm512_maskz_loadu_ps(low, b), b1 = _mm512_maskz_loadu_ps(high, b + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512 value = _mm512_set1_ps(left[r / 3][r % 3 * a.row]);
      sum[r][0] = _mm512_fmadd_ps(value, b0, sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(value, b1, sum[r][1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPointers; ++i) left[i] += a.column;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (const float* start = accumulate ? c + r * ldc : bias) {
      sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_maskz_loadu_ps(low, start));
      sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_maskz_loadu_ps(high, start + 16));
    }
    _mm512_mask_storeu_ps(c + r * ldc, low, sum[r][0]);
    _mm512_mask_storeu_ps(c + r * ldc + 16, high, sum[r][1]);
  }
}

using Tile = void (*)(int64_t, const Strided<float>&, const float*, int64_t, const float*, bool, float*, int64_t, int64_t);
inline constexpr Tile kTiles[] = {tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>,  tile<6>,  tile<7>,
                           tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};

// How many threads lie side by side over the columns of c [m, n], and how many over its rows.
struct Shares {
  int64_t across, down;
};

// Threads share b by columns, and by rows of c what is left of them; each packs the columns that it multiplies.
inline Shares shares_of(int64_t m, int64_t n, int64_t depth) {
  // Rows of c for which packing one row of b is as much work as multiplying.
  constexpr int64_t kPackingRows = 32;
  // Fused multiply-adds that a thread must have before another one is worth waking (about 10 us).
  constexpr int64_t kGrain = 1 << 20;
  const int64_t threads = std::clamp<int64_t>(m * n * depth / kGrain, 1, at::get_num_threads());
  int64_t across = 1, least = INT64_MAX;
  for (int64_t columns = 1; columns <= threads; ++columns) {
    // The last part has the most tiles, and a tile that is cut off costs as much as a whole one.
    const int64_t wide = tiles_of(n, columns, kTileColumns), tall = tiles_of(m, threads / columns, kTileRows);
    const int64_t work = wide * (tall * kTileRows + kPackingRows);
    if (work < least) across = columns, least = work;
  }
  return {across, threads / across};
}

}  // namespace mixout::cpu

#endif
