// The blocked product of Goto & van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008): a block of b is
// packed so that it stays in L2, a tile of a in L1, and a tile of c in registers. Phi is formed while packing.
// It is written once for all vectors, as tiles.h is.
#pragma once

#include <algorithm>
#include <memory>

#include <ATen/Parallel.h>

#include "blocks.h"
#include "rows.h"
#include "tiles.h"

namespace mixout::cpu {

namespace {

// A tile of a and a panel of b are 11 KB and 25 KB of L1, or 5 and 12. A depth of 192 keeps the chains of additions
// short: with 384 the gradients of a whole model had 1.5 times the rounding error.
constexpr int64_t kDepth = 192, kColumns = Vector::kColumns;
// Rows of the tile of a lie apart by a stride that is no power of two: they fall into different sets of the cache.
constexpr int64_t kDepthStride = kDepth + 16;
// Where the columns of a are contiguous, one of them is a vector.
static_assert(kTileRows <= Vector::kLanes);

// What a thread packs; kept between calls, since fresh memory costs page faults.
struct alignas(64) Scratch {
  float left[Vector::kLanes * kDepthStride];  // [row][depth], or [depth][row] where the columns of a are contiguous
  float rows[kTileColumns * kDepthStride];
  float right[kDepth * kColumns];
};

// Rows `rows` of a, over `depth`. Copied too: rows that lie apart by a power of two would evict one another from L1.
MIXOUT_VECTOR Strided<float> packed_left(const Strided<float>& a, const Block& rows, const Block& depth, Scratch& scratch) {
  const float* from = a.data + rows.first * a.row + depth.first * a.column;
  if (a.column == 1) {
    for (int64_t r = 0; r < rows.size; ++r)
      std::copy_n(from + r * a.row, depth.size, scratch.left + r * kDepthStride);
    return {scratch.left, kDepthStride, 1};
  }
  for (int64_t k = 0; k < depth.size; ++k)
    Vector::store(scratch.left + Vector::kLanes * k, Vector::load(from + k * a.column, rows.size));
  return {scratch.left, 1, Vector::kLanes};
}

// A block of b, cut into panels of kTileColumns columns. Where the last one is not full, zeros are multiplied.
struct Panels {
  const float* data;
  int64_t next;  // from panel to panel
  int64_t row;   // from row to row of a panel
};

MIXOUT_VECTOR Panels packed_right(const RightHand<float>& b, const Block& depth, const Block& columns, Scratch& scratch) {
  const int64_t missing = (kTileColumns - columns.size % kTileColumns) % kTileColumns;
  if (!b.transposed) {
    b.rows.write(depth.first, depth.size, columns.first, columns.size, scratch.right, kColumns);
    for (int64_t k = 0; k < depth.size; ++k) std::fill_n(scratch.right + k * kColumns + columns.size, missing, 0.0f);
    return {scratch.right, kTileColumns, kColumns};
  }
  for (int64_t j = 0; j < columns.size; j += kTileColumns) {
    const int64_t panel_columns = std::min(kTileColumns, columns.size - j);
    b.rows.write(columns.first + j, panel_columns, depth.first, depth.size, scratch.rows, kDepthStride);
    for (int64_t c = panel_columns; c < kTileColumns; ++c) std::fill_n(scratch.rows + c * kDepthStride, depth.size, 0.0f);
    float* panel = scratch.right + j * kDepth;
    for (int64_t k = 0; k < depth.size; k += Vector::kLanes)
      for (int64_t c = 0; c < kTileColumns; c += Vector::kLanes)
        Vector::transpose(scratch.rows + c * kDepthStride + k, kDepthStride, panel + k * kTileColumns + c, kTileColumns);
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

// product.h says what.
void multiply_by_vectors(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c) {
  const Shares shares = shares_of(m, n, depth);
  at::parallel_for(0, shares.across * shares.down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      multiply_part(
          part_of(m, part / shares.across, shares.down, kTileRows),
          part_of(n, part % shares.across, shares.across, kTileColumns), n, depth, a, b, bias, c);
  });
}

}  // namespace

}  // namespace mixout::cpu
