// The host version of intrinsics.h, on the machine of host_machine.h.
//
// An asynchronous copy poisons its destination when it is issued and delivers only when it is waited for. What a thread
// stores for other blocks reaches memory when it fences, and those see it that have an atomic operation and a fence after
// that. This is stricter than the memory model of PTX in one point: a fence speaks for its own thread alone.
#pragma once

#include <cmath>

#include "host_machine.h"

#define MIXOUT_DEVICE inline
#define MIXOUT_KERNEL(threads, blocks) void
#define MIXOUT_PARAMETER const

namespace mixout::cuda {

inline int thread_index() { return emulation::machine.thread; }
inline int64_t block_x() { return emulation::block().index[0]; }
inline int64_t block_y() { return emulation::block().index[1]; }
inline int64_t block_z() { return emulation::block().index[2]; }
inline int64_t blocks_x() { return emulation::machine.blocks[0]; }
inline int64_t blocks_y() { return emulation::machine.blocks[1]; }
inline int64_t blocks_z() { return emulation::machine.blocks[2]; }

inline void synchronize_block() { emulation::wait_for_block(); }
inline void device_fence() {
  emulation::publish();
  emulation::maybe_switch();
}
inline uint32_t atomic_add(uint32_t* counter, uint32_t value) {
  emulation::maybe_switch();
  const uint32_t before = *counter;
  *counter += value;
  emulation::block().acquired = emulation::machine.publications;
  emulation::maybe_switch();
  return before;
}
inline uint32_t warp_sum(uint32_t value) {
  const unsigned turn = emulation::exchange([=](auto& e, unsigned t, int lane) { e.value[t][lane] = value; },
                                            [](auto&, unsigned) {});
  uint32_t sum = 0;
  for (const uint32_t v : emulation::warp().exchange.value[turn]) sum += v;
  return sum;
}
inline uint32_t warp_ballot(bool predicate) {
  return warp_sum(predicate ? 1u << thread_index() % kWarpSize : 0u);
}
inline uint32_t count_bits(uint32_t word) { return static_cast<uint32_t>(__builtin_popcount(word)); }
inline void store_coherent(float4* to, const float4& value) {
  emulation::fiber().stores.push_back({to, value});
  emulation::maybe_switch();
}
inline float4 load_coherent(const float4* from) {
  emulation::maybe_switch();
  const auto found = emulation::machine.published.find(from);
  if (found != emulation::machine.published.end() && found->second <= emulation::fiber().seen) return *from;
  return {NAN, NAN, NAN, NAN};
}
inline int64_t load_acquire(const int64_t* from) { return *from; }
template <typename Vector>
void store_vector(Vector* to, const Vector& vector) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vector)) emulation::fail("a vector is not stored at a multiple of its size");
  *to = vector;
}
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulation::block().shared.get()); }

inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulation::fail("an asynchronous copy is not aligned to 16 bytes");
  std::memset(shared, emulation::kPoison, 16);
  emulation::fiber().copies.back().push_back({shared, global, bytes});
  emulation::maybe_switch();
}
inline void copy_async_commit() { emulation::fiber().copies.emplace_back(); }
inline void copy_async_wait(int pending) {
  auto& groups = emulation::fiber().copies;
  const int complete = static_cast<int>(groups.size()) - 1 - pending;
  if (complete <= 0) return;
  for (int i = 0; i < complete; ++i)
    for (const auto& copy : groups[i]) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  groups.erase(groups.begin(), groups.begin() + complete);
}

template <bool kTransposed>
void load_matrices(uint32_t (&matrix)[4], const void* row) {
  const unsigned turn = emulation::exchange([=](auto& e, unsigned t, int lane) { e.row[t][lane] = row; },
                                            [](auto&, unsigned) {});
  const int lane = thread_index() % kWarpSize, group = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    uint32_t half[2];
    for (int k = 0; k < 2; ++k) {
      const int r = kTransposed ? pair + k : group, c = kTransposed ? group : pair + k;
      half[k] = static_cast<const uint16_t*>(emulation::warp().exchange.row[turn][8 * i + r])[c];
    }
    matrix[i] = half[0] | half[1] << 16;
  }
}

inline float float_of(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}
inline uint32_t word_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

inline float fused_multiply_add(float a, float b, float c) { return a * b + c; }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(f16 value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
}

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  if (value != value) return {0x7FFF};
  const uint32_t word = word_of(value);
  return {static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  f16 result;
  std::memcpy(&result, &half, sizeof(result));
  return result;
}

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto value = [](uint32_t word, int half) { return to_float(T{static_cast<uint16_t>(word >> 16 * half)}); };
  const unsigned turn = emulation::exchange(
      [&](auto& e, unsigned t, int lane) {
        std::copy(a, a + 4, e.a[t][lane]);
        e.b[t][lane][0] = b0;
        e.b[t][lane][1] = b1;
      },
      [&](auto& e, unsigned t) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < kWarpSize; ++lane)
          for (int half = 0; half < 2; ++half) {
            const int group = lane / 4, k = lane % 4 * 2 + half;
            for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][k + i / 2 * 8] = value(e.a[t][lane][i], half);
            for (int i = 0; i < 2; ++i) right[k + i * 8][group] = value(e.b[t][lane][i], half);
          }
        for (int i = 0; i < 16; ++i)
          for (int j = 0; j < 8; ++j) {
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += left[i][k] * right[k][j];
            e.product[t][i][j] = sum;
          }
      });
  const int lane = thread_index() % kWarpSize;
  for (int i = 0; i < 4; ++i) d[i] += emulation::warp().exchange.product[turn][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace mixout::cuda
