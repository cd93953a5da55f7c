// Tiles of the operands in shared memory, and their way into registers.
#pragma once

#include "intrinsics.h"

namespace mixout::cuda {

constexpr int kProductThreads = 256;
constexpr int kDepth = 64;  // contraction of one stage

// A tile in shared memory, in 16-byte chunks that are permuted within a row so that neither copies nor fragment loads
// meet in a bank: the eight rows of an 8x8 matrix for 16-bit types; rows 0 to 3, and rows 0, 2, 4, 6 for float32,
// which is read in pairs along a row, or one by one down a column.
template <typename T, int kTileRows, int kColumns>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T), kRowChunks = kColumns / kChunk;
  static constexpr int kBytes = kTileRows * kColumns * sizeof(T);

  static MIXOUT_DEVICE int chunk(int row, int index) {
    const int swizzle = sizeof(T) == 2 ? row & 7 : ((row ^ row >> 2) & 3) << 1;
    return (row * kRowChunks + (index ^ swizzle)) * 16;
  }
  static MIXOUT_DEVICE const unsigned char* at(const unsigned char* tile, int row, int column) {
    return tile + chunk(row, column / kChunk) + column % kChunk * sizeof(T);
  }

  // Four neighbours of a row; `column` is a multiple of four.
  static MIXOUT_DEVICE void load_four(const unsigned char* tile, int row, int column, float (&value)[4]) {
    if constexpr (sizeof(T) == 4) {
      unpack_vector<T>(*reinterpret_cast<const Vector128*>(at(tile, row, column)), value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = to_float(reinterpret_cast<const T*>(at(tile, row, column))[i]);
    }
  }

  // What this thread copies: 16 bytes of a row in every step, all in one column of chunks, kStepRows rows apart. That
  // is a multiple of 8, so the permutation is the same in every step, and the chunks lie 4 KB apart in shared memory.
  static constexpr int kStepRows = kProductThreads / kRowChunks, kSteps = kTileRows / kStepRows;
  static constexpr int kStepBytes = kProductThreads * 16;
  static_assert(kProductThreads % kRowChunks == 0 && kTileRows % kStepRows == 0 && kStepRows % 8 == 0);

  // Where the copies of a thread begin in a [rows, columns] matrix; it moves on from tile to tile.
  class Source {
   public:
    MIXOUT_DEVICE Source(const T* matrix, int64_t row, int64_t column, int64_t rows, int64_t columns) {
      row += thread_index() / kRowChunks;
      column += thread_index() % kRowChunks * kChunk;
      from_ = matrix + row * columns + column;
      columns_ = columns;
      rows_left_ = left(rows - row);
      columns_left_ = left(columns - column);
    }
    MIXOUT_DEVICE void move_right(int columns) {
      from_ += columns;
      columns_left_ -= columns;
    }
    MIXOUT_DEVICE void move_down(int rows) {
      from_ += rows * columns_;
      rows_left_ -= rows;
    }

    // Copies the tile; what lies outside of the matrix is zero.
    MIXOUT_DEVICE void load(unsigned char* tile, bool aligned) const {
      tile += chunk(thread_index() / kRowChunks, thread_index() % kRowChunks);
      const int count = columns_left_ < 0 ? 0 : min_of(columns_left_, kChunk);
      const T* from = from_;
      if (aligned) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step, from += kStepRows * columns_)
          copy_async(tile + step * kStepBytes, from,
                     step * kStepRows < rows_left_ ? count * static_cast<int>(sizeof(T)) : 0);
      } else {
#pragma unroll 1
        for (int step = 0; step < kSteps; ++step, from += kStepRows * columns_) {
          T* to = reinterpret_cast<T*>(tile + step * kStepBytes);
          for (int k = 0; k < kChunk; ++k) to[k] = k < count && step * kStepRows < rows_left_ ? from[k] : T{};
        }
      }
    }

   private:
    // Enough for any chunk: 32 bits are cheaper to count down.
    static MIXOUT_DEVICE int left(int64_t count) { return static_cast<int>(min_of<int64_t>(count, 1 << 30)); }

    const T* from_;
    int64_t columns_;
    int rows_left_, columns_left_;
  };
};

// The tile of w or u, kOut outputs by kDepth. Its fragment is the left operand of mma.sync, 16 outputs by 16 deep:
// pair i of this thread lies at output lane / 4 + i % 2 * 8, depth lane % 4 * 2 + i / 2 * 8 and the next.
template <typename T, int kOut, bool kContiguous>
struct WeightTile : Tile<T, kContiguous ? kOut : kDepth, kContiguous ? kDepth : kOut> {
  using Base = Tile<T, kContiguous ? kOut : kDepth, kContiguous ? kDepth : kOut>;

  // Four consecutive depths of one output.
  static MIXOUT_DEVICE void line(const unsigned char* tile, int output, int depth, float (&value)[4]) {
    if constexpr (kContiguous) {
      Base::load_four(tile, output, depth, value);
    } else {
#pragma unroll
      for (int d = 0; d < 4; ++d)
        value[d] = to_float(*reinterpret_cast<const T*>(Base::at(tile, depth + d, output)));
    }
  }

  static MIXOUT_DEVICE void fragment(const unsigned char* tile, int output, int depth, Pair (&pair)[4]) {
    const int lane = thread_index() % kWarpSize;
    if constexpr (sizeof(T) == 2) {
      const int out = output + lane / 8 % 2 * 8, deep = depth + lane / 16 * 8;
      uint32_t matrix[4];
      load_matrices<!kContiguous>(
          matrix, kContiguous ? Base::at(tile, out + lane % 8, deep) : Base::at(tile, deep + lane % 8, out));
#pragma unroll
      for (int i = 0; i < 4; ++i) pair[i] = unpack<T>(matrix[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int out = output + lane / 4 + i % 2 * 8, deep = depth + lane % 4 * 2 + i / 2 * 8;
        if constexpr (kContiguous) {
          pair[i] = *reinterpret_cast<const Pair*>(Base::at(tile, out, deep));
        } else {
          pair[i].low = *reinterpret_cast<const T*>(Base::at(tile, deep, out));
          pair[i].high = *reinterpret_cast<const T*>(Base::at(tile, deep + 1, out));
        }
      }
    }
  }
};

}  // namespace mixout::cuda
