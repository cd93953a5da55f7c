// The fused product of the CPU backend: float32, its right-hand matrix made row by row while it is packed.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mixout::cpu {

// The vectors that the product is written for.
enum class Vectors { none, avx2, avx512 };

// The widest that this CPU and this build have and ONEDNN_MAX_CPU_ISA allows.
Vectors product_vectors();

// Whether F.linear multiplies large float32 matrices faster: its library is MKL, which uses all that Intel's CPUs have,
// and AVX2 on others.
bool library_is_faster();

// c [m, n] = a [m, depth] b [depth, n] + bias [n]; rows of c lie `n` apart. bias may be nullptr.
// Every element is summed in an order that depends on its k alone, so the result does not depend on the threads.
void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c);

}  // namespace mixout::cpu
