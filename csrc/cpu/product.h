// The fused product of the CPU backend: float32, its right-hand matrix made row by row while it is packed.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mixout::cpu {

// Whether this CPU and this build can multiply: the inner loop is written for AVX-512.
bool product_available();

// Whether F.linear multiplies float32 with AVX-512 too: its library is MKL, which does so on Intel's CPUs alone.
bool library_uses_avx512();

// c [m, n] = a [m, depth] b [depth, n] + bias [n]; rows of c lie `n` apart. bias may be nullptr.
// Every element is summed in an order that depends on its k alone, so the result does not depend on the threads.
void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c);

}  // namespace mixout::cpu
