// The tile of c in registers, and how threads share a product of such tiles.
//
// They are written once for all vectors: who includes this has included avx2.h or avx512.h before, which say what a
// Vector is.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include <ATen/Parallel.h>

#include "blocks.h"
#include "rows.h"

namespace mixout::cpu {

namespace {

constexpr int64_t kTileRows = Vector::kTileRows, kTileColumns = 2 * Vector::kLanes;

// c [kRows, n] = a b over `depth`, plus c itself, or else `bias` if there is one. b has kTileColumns columns, whatever
// n is.
template <int kRows>
MIXOUT_VECTOR void tile(
    int64_t depth, const Strided<float>& a, const float* b, int64_t ldb, const float* bias, bool accumulate, float* c,
    int64_t ldc, int64_t n) {
  Vector::Type sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = Vector::zero();
    __builtin_prefetch(c + r * ldc, 1);  // for the end: the products take longer than any cache
    __builtin_prefetch(c + r * ldc + kTileColumns - 1, 1);
  }
  // Three rows to a pointer: one address register and one stride reach them all.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* left[kPointers];
  for (int i = 0; i < kPointers; ++i) left[i] = a.data + 3 * i * a.row;
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    const auto b0 = Vector::load(b), b1 = Vector::load(b + Vector::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto value = Vector::broadcast(left[r / 3][r % 3 * a.row]);
      sum[r][0] = Vector::multiply_add(value, b0, sum[r][0]);
      sum[r][1] = Vector::multiply_add(value, b1, sum[r][1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPointers; ++i) left[i] += a.column;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (const float* start = accumulate ? c + r * ldc : bias) {
      sum[r][0] = Vector::add(sum[r][0], Vector::load(start, n));
      sum[r][1] = Vector::add(sum[r][1], Vector::load(start + Vector::kLanes, n - Vector::kLanes));
    }
    Vector::store(c + r * ldc, sum[r][0], n);
    Vector::store(c + r * ldc + Vector::kLanes, sum[r][1], n - Vector::kLanes);
  }
}

using Tile = void (*)(int64_t, const Strided<float>&, const float*, int64_t, const float*, bool, float*, int64_t, int64_t);

// tile<1>, tile<2>, ...
template <int... kBefore>
constexpr std::array<Tile, sizeof...(kBefore)> tile_table(std::integer_sequence<int, kBefore...>) {
  return {tile<kBefore + 1>...};
}
constexpr auto kTiles = tile_table(std::make_integer_sequence<int, kTileRows>());

// How many threads lie side by side over the columns of c [m, n], and how many over its rows.
struct Shares {
  int64_t across, down;
};

// Threads share b by columns, and by rows of c what is left of them; each packs the columns that it multiplies.
Shares shares_of(int64_t m, int64_t n, int64_t depth) {
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

}  // namespace

}  // namespace mixout::cpu
