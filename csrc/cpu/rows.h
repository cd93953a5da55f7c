// Matrices that need not exist in memory: a product has the rows of one made as it packs them, and hands its sums out.
#pragma once

#include <cstdint>

namespace mixout::cpu {

// A matrix in memory: element [i, k] is data[i * row + k * column]; one of the two strides is 1.
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;
};

// Of elements T: float, c10::BFloat16 or c10::Half. Called from several threads.
template <typename T>
struct Rows {
  virtual ~Rows() = default;
  // Has what such a part is made from brought into the caches: short pieces of rows are no stream to the hardware.
  virtual void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {}
  // The matrix where it lies in memory, with a column stride of 1; else its data is nullptr.
  virtual Strided<T> in_place() const { return {nullptr, 0, 1}; }
  // out[r * ld + c] = element [row + r, column + c] for r < rows and c < columns.
  virtual void write(int64_t row, int64_t rows, int64_t column, int64_t columns, T* out, int64_t ld) const = 0;
};

// The right-hand matrix b [depth, n] of a product, or its transpose.
template <typename T>
struct RightHand {
  const Rows<T>& rows;
  bool transposed;  // b[k, j] is element [j, k] of `rows`
};

// Where a product goes. Called from several threads, for parts that cover it.
struct Sums {
  virtual ~Sums() = default;
  // Element [row + r, column + c] is sums[r * ld + c], for r < rows and c < columns.
  virtual void store(
      int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const = 0;
};

}  // namespace mixout::cpu
