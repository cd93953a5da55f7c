#include "product.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include "blocks.h"
#include "isa.h"
#include "product_levels.h"

namespace mixout::cpu {

#ifdef MIXOUT_AVX512

namespace {

Vectors best_vectors() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && isa_allows("AVX512", "AVX10")) return Vectors::avx512;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has_avx2 && isa_allows("AVX2", "AVX512", "AVX10") ? Vectors::avx2 : Vectors::none;
}

}  // namespace

Vectors product_vectors() {
  static const Vectors vectors = best_vectors();
  return vectors;
}

bool library_is_faster() {
  __builtin_cpu_init();
  return at::hasMKL() && __builtin_cpu_is("intel");
}

void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<float>& a, const RightHand<float>& b, const float* bias, float* c) {
  if (product_vectors() == Vectors::avx512) return multiply_avx512(m, n, depth, a, b, bias, c);
  multiply_avx2(m, n, depth, a, b, bias, c);
}

#else

Vectors product_vectors() { return Vectors::none; }

bool library_is_faster() { return false; }

void multiply(int64_t, int64_t, int64_t, const Strided<float>&, const RightHand<float>&, const float*, float*) {
  TORCH_CHECK(false, "mixout_kernels: the fused product of the CPU backend is written for x86-64");
}

#endif

}  // namespace mixout::cpu
