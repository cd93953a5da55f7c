// The fused product of the CPU backend: float32, its right-hand matrix made row by row while it is packed.
#pragma once

#include <cstdint>

namespace mixout::cpu {

// A float32 matrix that need not exist in memory. Called from several threads.
struct Rows {
  virtual ~Rows() = default;
  // out[r * ld + c] = element [row + r, column + c] for r < rows and c < columns.
  virtual void write(int64_t row, int64_t rows, int64_t column, int64_t columns, float* out, int64_t ld) const = 0;
};

// Whether this CPU and this build can multiply: the inner loop is written for AVX-512.
bool product_available();

// Whether F.linear multiplies float32 with AVX-512 too: its library is MKL, which does so on Intel's CPUs alone.
bool library_uses_avx512();

// Element [i, k] is data[i * row + k * column]; one of the two strides is 1.
struct Strided {
  const float* data;
  int64_t row, column;
};

// The right-hand matrix b [depth, n], or its transpose.
struct RightHand {
  const Rows& rows;
  bool transposed;  // b[k, j] is element [j, k] of `rows`
};

// c [m, n] = a [m, depth] b [depth, n] + bias [n]; rows of c lie `n` apart. bias may be nullptr.
// Every element is summed in an order that depends on its k alone, so the result does not depend on the threads.
void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided& a, const RightHand& b, const float* bias, float* c);

}  // namespace mixout::cpu
