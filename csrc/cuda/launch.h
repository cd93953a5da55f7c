// Starts a kernel and turns a failure into an exception that names it.
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "intrinsics.h"

namespace mixout::cuda {

struct Grid {
  int64_t x, y = 1, z = 1;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(MIXOUT_HOST_EMULATION)

inline int shared_memory_limit() { return emulation::options.shared_bytes; }
// Small shapes then share a contraction among blocks, as large ones do on a GPU.
inline int multiprocessor_count() { return 4; }

template <typename... Parameters, typename... Arguments>
void launch(
    const char*, void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void*,
    const Arguments&... arguments) {
  static std::mutex one_machine;
  const std::lock_guard<std::mutex> lock(one_machine);
  emulation::run_grid({grid.x, grid.y, grid.z}, threads, shared_bytes, [&] { kernel(arguments...); });
}

#else

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(
        std::string("mixout_kernels: CUDA kernel ") + kernel + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int attribute(cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, current_device()), "cudaDeviceGetAttribute");
  return value;
}

// Of the current device: what a block can ask for.
inline int shared_memory_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int multiprocessor_count() { return attribute(cudaDevAttrMultiProcessorCount); }

template <typename... Parameters, typename... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
    const Arguments&... arguments) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#endif

}  // namespace mixout::cuda
