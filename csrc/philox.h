// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
// written once for host compilers, nvcc and the vectorised CPU loops.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MIXOUT_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline, because a function that is not inlined into a target_clones caller runs its baseline code.
#define MIXOUT_HOST_DEVICE inline __attribute__((always_inline))
#else
#define MIXOUT_HOST_DEVICE inline
#endif

namespace mixout {

struct Philox4x32 {
  uint32_t word[4];
};

MIXOUT_HOST_DEVICE Philox4x32 philox4x32_10(uint64_t key, uint64_t counter_lo, uint64_t counter_hi = 0) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_lo), c1 = static_cast<uint32_t>(counter_lo >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_hi), c3 = static_cast<uint32_t>(counter_hi >> 32);
  // Written out: GCC vectorises a loop over counters only when its body is straight-line code.
#define MIXOUT_PHILOX_ROUND                                          \
  {                                                                  \
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;      \
    const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;      \
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;                   \
    c1 = static_cast<uint32_t>(b);                                   \
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;                   \
    c3 = static_cast<uint32_t>(a);                                   \
    k0 += 0x9E3779B9u;                                               \
    k1 += 0xBB67AE85u;                                               \
  }
  MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND
  MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND MIXOUT_PHILOX_ROUND
#undef MIXOUT_PHILOX_ROUND
  return {{c0, c1, c2, c3}};
}

}  // namespace mixout
