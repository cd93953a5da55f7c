// Everything the kernels use that a host compiler does not have: indices, barriers, shared memory, cp.async, ldmatrix,
// mma.sync, conversions of half-precision types. With MIXOUT_HOST_EMULATION the same names run on the host
// (host_emulation.h), so that a machine without a GPU executes the same kernel source.
#pragma once

#include <cstdint>

namespace mixout::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct alignas(16) Vector128 {
  uint32_t word[4];
};
struct alignas(8) Vector64 {
  uint32_t word[2];
};
struct alignas(8) Pair {
  float low, high;
};

constexpr int kWarpSize = 32;

}  // namespace mixout::cuda

#if defined(MIXOUT_HOST_EMULATION)
#include "host_emulation.h"
#else

#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "mixout_kernels needs compute capability 8.0 or later; see TORCH_CUDA_ARCH_LIST"
#endif

#define MIXOUT_DEVICE __device__ __forceinline__
// `blocks`: how many a multiprocessor shall hold at once, which bounds the registers. Without it ptxas aims at two even
// where shared memory admits one, and spills for it.
#define MIXOUT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MIXOUT_PARAMETER const __grid_constant__

namespace mixout::cuda {

MIXOUT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MIXOUT_DEVICE int64_t block_x() { return blockIdx.x; }
MIXOUT_DEVICE int64_t block_y() { return blockIdx.y; }
MIXOUT_DEVICE int64_t block_z() { return blockIdx.z; }
MIXOUT_DEVICE int64_t blocks_x() { return gridDim.x; }
MIXOUT_DEVICE int64_t blocks_y() { return gridDim.y; }
MIXOUT_DEVICE int64_t blocks_z() { return gridDim.z; }

MIXOUT_DEVICE void synchronize_block() { __syncthreads(); }
MIXOUT_DEVICE void device_fence() { __threadfence(); }
MIXOUT_DEVICE uint32_t atomic_add(uint32_t* counter, uint32_t value) { return atomicAdd(counter, value); }
MIXOUT_DEVICE uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(0xFFFFFFFFu, value); }
MIXOUT_DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }
MIXOUT_DEVICE uint32_t count_bits(uint32_t word) { return static_cast<uint32_t>(__popc(word)); }

// What blocks hand each other, past the first-level cache, which is not coherent between multiprocessors.
MIXOUT_DEVICE void store_coherent(float4* to, const float4& value) { __stcg(to, value); }
MIXOUT_DEVICE float4 load_coherent(const float4* from) { return __ldcg(from); }

// The value has arrived before any later access to memory is issued.
MIXOUT_DEVICE int64_t load_acquire(const int64_t* from) {
  int64_t value;
  asm volatile("ld.acquire.cta.global.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// One access of 16 or 8 bytes to global memory. For sm_80 and sm_90a nvcc 13.0 makes four of 4 bytes of a plain store of
// packed 16-bit results, and of every other one of float32 results.
MIXOUT_DEVICE void store_vector(Vector128* to, const Vector128& vector) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(vector.word[0]), "r"(vector.word[1]),
               "r"(vector.word[2]), "r"(vector.word[3])
               : "memory");
}
MIXOUT_DEVICE void store_vector(Vector64* to, const Vector64& vector) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(vector.word[0]), "r"(vector.word[1]) : "memory");
}

MIXOUT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
MIXOUT_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` (0 to 16) and fills up to 16 with zeros. Both addresses are multiples of 16.
MIXOUT_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
MIXOUT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` (0, 1 or 2) groups of this thread are under way.
MIXOUT_DEVICE void copy_async_wait(int pending) {
  if (pending == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (pending == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
MIXOUT_DEVICE void load_matrices(uint32_t (&matrix)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d [16, 8] += a [16, 16] b [16, 8], accumulated in float32.
template <typename T>
MIXOUT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define MIXOUT_MULTIPLY_ADD(type, name)                                                                          \
  template <>                                                                                                    \
  MIXOUT_DEVICE void multiply_add<type>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {       \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
MIXOUT_MULTIPLY_ADD(bf16, "bf16")
MIXOUT_MULTIPLY_ADD(f16, "f16")
#undef MIXOUT_MULTIPLY_ADD

MIXOUT_DEVICE float float_of(uint32_t word) { return __uint_as_float(word); }
MIXOUT_DEVICE uint32_t word_of(float value) { return __float_as_uint(value); }

// For sums of products; the mix itself is compiled without contraction, so that all backends round it alike.
MIXOUT_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

MIXOUT_DEVICE float to_float(float value) { return value; }
MIXOUT_DEVICE float to_float(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
MIXOUT_DEVICE float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <typename T>
MIXOUT_DEVICE T from_float(float value);
template <>
MIXOUT_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
MIXOUT_DEVICE bf16 from_float<bf16>(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
MIXOUT_DEVICE f16 from_float<f16>(float value) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two values rounded into one word, `low` in its low half.
template <typename T>
MIXOUT_DEVICE uint32_t pack(float low, float high);
template <>
MIXOUT_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
MIXOUT_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

}  // namespace mixout::cuda

#endif  // MIXOUT_HOST_EMULATION

namespace mixout::cuda {

template <typename T>
MIXOUT_DEVICE T min_of(T a, T b) {
  return a < b ? a : b;
}

MIXOUT_DEVICE void add_to(float4& sum, const float4& value) {
  sum.x += value.x;
  sum.y += value.y;
  sum.z += value.z;
  sum.w += value.w;
}

template <typename T>
MIXOUT_DEVICE Pair unpack(uint32_t word) {
  return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}

// The elements of a 16-byte vector as float32, and back.
template <typename T>
MIXOUT_DEVICE void unpack_vector(const Vector128& vector, float* value) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      value[i] = float_of(vector.word[i]);
    } else {
      const Pair pair = unpack<T>(vector.word[i]);
      value[2 * i] = pair.low;
      value[2 * i + 1] = pair.high;
    }
  }
}

template <typename T>
MIXOUT_DEVICE Vector128 pack_vector(const float* value) {
  Vector128 vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) vector.word[i] = word_of(value[i]);
    else vector.word[i] = pack<T>(value[2 * i], value[2 * i + 1]);
  }
  return vector;
}

}  // namespace mixout::cuda
