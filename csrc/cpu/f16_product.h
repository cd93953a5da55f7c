// The fused product of the CPU backend for float16, which few CPUs multiply: operands are widened while they are packed,
// the tiles are those of float32, and sums are float32.
#pragma once

#include <cstdint>

#include <c10/util/Half.h>

#include "rows.h"

namespace mixout::cpu {

// Whether this CPU and this build can do that: the inner loop is written for AVX-512.
bool f16_product_available();

// Whether F.linear multiplies float16 by instructions of this CPU. If not, it runs a loop of torch's own, which was 10
// to 50 times slower than float32 on Zen 4.
bool library_multiplies_f16();

// a [m, depth] b [depth, n]. Every element is summed in an order that depends on its k alone, so the result does not
// depend on the threads.
void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<c10::Half>& a, const RightHand<c10::Half>& b, const Sums& c);

// out[r, c] = sums[r, c] * scale + bias[c], rounded once, for c < n <= 32. bias = nullptr is zero. Row strides: lds, ldo.
void round_sums(
    const float* sums, int64_t lds, float scale, const c10::Half* bias, c10::Half* out, int64_t ldo, int64_t n,
    int64_t rows);

}  // namespace mixout::cpu
