// The fused product by AVX-512.
#include "product_levels.h"

#include "blocks.h"

#ifdef MIXOUT_AVX512

#include "avx512.h"
#include "product_blocks.h"

namespace mixout::cpu {

void multiply_avx512(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c) {
  multiply_by_vectors(m, n, depth, a, b, bias, c);
}

}  // namespace mixout::cpu

#endif
