// The fused product of the CPU backend in bfloat16: its right-hand matrix is made row by row while it is packed, sums
// are float32, and where they go is the caller's business.
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>

#include "rows.h"

namespace mixout::cpu {

// What multiplies bfloat16: nothing that this is written for, vdpbf16ps (AVX512_BF16), or the tiles of AMX.
enum class Bf16Unit { none, dot, tiles };

// The best that this CPU has, the system allows, and ONEDNN_MAX_CPU_ISA does not forbid: who holds oneDNN to less means
// us as well.
Bf16Unit bf16_unit();

// a [m, depth] b [depth, n]. Every element is summed in an order that depends on its k alone, so the result does not
// depend on the threads. As everywhere in these instructions, subnormal numbers count as zero.
void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<c10::BFloat16>& a, const RightHand<c10::BFloat16>& b,
    const Sums& c);

// out[r, c] = sums[r, c] + bias[c], rounded once, for c < n <= 32. bias = nullptr is zero. Row strides: lds, ldo.
void round_sums(
    const float* sums, int64_t lds, const c10::BFloat16* bias, c10::BFloat16* out, int64_t ldo, int64_t n,
    int64_t rows);

}  // namespace mixout::cpu
