// The fused product in float32 by each kind of vector; product.h says what it computes, product.cpp which one is taken.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mixout::cpu {

void multiply_avx2(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c);
void multiply_avx512(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c);

}  // namespace mixout::cpu
