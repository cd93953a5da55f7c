// The fused product by AVX2.
#include "product_levels.h"

#include "blocks.h"

#ifdef MIXOUT_AVX2

#include "avx2.h"
#include "product_blocks.h"

namespace mixout::cpu {

void multiply_avx2(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c) {
  multiply_by_vectors(m, n, depth, a, b, bias, c);
}

}  // namespace mixout::cpu

#endif
