// The blocked product of Goto & van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008): a block of b is
// packed so that it stays in L2, a tile of a in L1, and a tile of c in registers. Phi is formed while packing.
#include "product.h"

#include <algorithm>
#include <memory>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "tiles.h"

namespace mixout::cpu {

#ifdef MIXOUT_AVX512

namespace {

// A packed block of b: 590 KB of an L2 cache of 1 MB. A tile of a: 11 KB of L1. A depth of 192 keeps the chains of
// additions short: with 384 the gradients of a whole model had 1.5 times the rounding error.
constexpr int64_t kDepth = 192, kColumns = 768;
// Rows of the tile of a lie apart by a stride that is no power of two: they fall into different sets of the cache.
constexpr int64_t kDepthStride = kDepth + 16;

// What a thread packs; kept between calls, since fresh memory costs page faults.
struct alignas(64) Scratch {
  float left[16 * kDepthStride];  // [row][depth], or [depth][16] where it is the columns of a that are contiguous
  float rows[kTileColumns * kDepthStride];
  float right[kDepth * kColumns];
};

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
  const Shares shares = shares_of(m, n, depth);
  at::parallel_for(0, shares.across * shares.down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      multiply_part(
          part_of(m, part / shares.across, shares.down, kTileRows),
          part_of(n, part % shares.across, shares.across, kTileColumns), n, depth, a, b, bias, c);
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
