// The blocked product of Goto & van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008): a block of b is
// packed so that it stays in L2, a tile of a in L1, and a tile of c in registers. Phi is formed while packing.
#include "product.h"

#include <algorithm>
#include <memory>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "blocks.h"

namespace mixout::cpu {

#ifdef MIXOUT_AVX512

namespace {

// Of c in registers: 28 accumulators of 16, which leaves four registers for a and b. One fused multiply-add in 28 waits
// for nothing, so both units are busy: 99 % of their peak was measured on Zen 5 with a and b in L1.
constexpr int64_t kTileRows = 14, kTileColumns = 32;
// A packed block of b: 590 KB of an L2 cache of 1 MB. A tile of a: 11 KB of L1. A depth of 192 keeps the chains of
// additions short: with 384 the gradients of a whole model had 1.5 times the rounding error.
constexpr int64_t kDepth = 192, kColumns = 768;
// Rows of the tile of a lie apart by a stride that is no power of two: they fall into different sets of the cache.
constexpr int64_t kDepthStride = kDepth + 16;
// Rows of c for which packing one row of b is as much work as multiplying.
constexpr int64_t kPackingRows = 32;
// Fused multiply-adds that a thread must have before another one is worth waking (about 10 us).
constexpr int64_t kGrain = 1 << 20;

// What a thread packs; kept between calls, since fresh memory costs page faults.
struct alignas(64) Scratch {
  float left[16 * kDepthStride];  // [row][depth], or [depth][16] where it is the columns of a that are contiguous
  float rows[kTileColumns * kDepthStride];
  float right[kDepth * kColumns];
};

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
constexpr Tile kTiles[] = {tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>,  tile<6>,  tile<7>,
                           tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};

// Rows `rows` of a, over `depth`. Copied too: rows that lie apart by a power of two would evict one another from L1.
MIXOUT_AVX512 Strided<float> packed_left(const Strided<float>& a, const Block& rows, const Block& depth, Scratch& scratch) {
  const float* from = a.data + rows.first * a.row + depth.first * a.column;
  if (a.column == 1) {
    for (int64_t r = 0; r < rows.size; ++r)
      std::copy_n(from + r * a.row, depth.size, scratch.left + r * kDepthStride);
    return {scratch.left, kDepthStride, 1};
  }
  const __mmask16 present = lanes(rows.size);
  for (int64_t k = 0; k < depth.size; ++k)
    _mm512_store_ps(scratch.left + 16 * k, _mm512_maskz_loadu_ps(present, from + k * a.column));
  return {scratch.left, 1, 16};
}

// A block of b, cut into panels of kTileColumns columns.
struct Panels {
  const float* data;
  int64_t next;  // from panel to panel
  int64_t row;   // from row to row of a panel
};

Panels packed_right(const RightHand<float>& b, const Block& depth, const Block& columns, Scratch& scratch) {
  if (!b.transposed) {
    b.rows.write(depth.first, depth.size, columns.first, columns.size, scratch.right, kColumns);
    return {scratch.right, kTileColumns, kColumns};
  }
  for (int64_t j = 0; j < columns.size; j += kTileColumns) {
    // What lies beyond the matrix is turned too, and then masked out of the product.
    const int64_t panel_columns = std::min(kTileColumns, columns.size - j);
    b.rows.write(columns.first + j, panel_columns, depth.first, depth.size, scratch.rows, kDepthStride);
    float* panel = scratch.right + j * kDepth;
    for (int64_t k = 0; k < depth.size; k += 16)
      for (int64_t c = 0; c < kTileColumns; c += 16)
        transpose_16x16(scratch.rows + c * kDepthStride + k, kDepthStride, panel + k * kTileColumns + c, kTileColumns);
  }
  return {scratch.right, kTileColumns * kDepth, kTileColumns};
}

// Rows `rows` and columns `columns` of c, by one thread.
void multiply_part(
    const Block& rows, const Block& columns, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b,
    const float* bias, float* c) {
  thread_local const auto scratch = std::make_unique<Scratch>();
  const int64_t column_blocks = (columns.size + kColumns - 1) / kColumns;
  const int64_t depth_blocks = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  for (int64_t j = 0; j < column_blocks; ++j) {
    Block wide = part_of(columns.size, j, column_blocks, kTileColumns);
    wide.first += columns.first;
    for (int64_t k = 0; k < depth_blocks; ++k) {
      const Block deep{k * kDepth, std::min(kDepth, depth - k * kDepth)};
      const Panels right = packed_right(b, deep, wide, *scratch);
      for (int64_t r = 0; r < rows.size; r += kTileRows) {
        const Block tall{rows.first + r, std::min(kTileRows, rows.size - r)};
        const Strided<float> left = packed_left(a, tall, deep, *scratch);
        for (int64_t q = 0; q < wide.size; q += kTileColumns)
          kTiles[tall.size - 1](
              deep.size, left, right.data + q / kTileColumns * right.next, right.row,
              bias ? bias + wide.first + q : nullptr, k > 0, c + tall.first * n + wide.first + q, n, wide.size - q);
      }
    }
  }
}

}  // namespace

bool product_available() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
}

bool library_uses_avx512() { return product_available() && at::hasMKL() && __builtin_cpu_is("intel"); }

void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c) {
  const int64_t threads = std::clamp<int64_t>(m * n * depth / kGrain, 1, at::get_num_threads());
  // Threads share b by columns, and by rows of c what is left of them; each packs the columns that it multiplies.
  int64_t across = 1, least = INT64_MAX;
  for (int64_t columns = 1; columns <= threads; ++columns) {
    // The last part has the most tiles, and a tile that is cut off costs as much as a whole one.
    const int64_t wide = tiles_of(n, columns, kTileColumns), tall = tiles_of(m, threads / columns, kTileRows);
    const int64_t work = wide * (tall * kTileRows + kPackingRows);
    if (work < least) across = columns, least = work;
  }
  const int64_t down = threads / across;
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      multiply_part(
          part_of(m, part / across, down, kTileRows), part_of(n, part % across, across, kTileColumns), n, depth, a, b,
          bias, c);
  });
}

#else

bool product_available() { return false; }

bool library_uses_avx512() { return false; }

void multiply(int64_t, int64_t, int64_t, const Strided<float>&, const RightHand<float>&, const float*, float*) {
  TORCH_CHECK(false, "mixout_kernels: the fused product of the CPU backend is written for x86-64");
}

#endif

}  // namespace mixout::cpu
