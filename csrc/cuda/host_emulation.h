// The host version of intrinsics.h: one block at a time, each of its threads a fiber.
//
// It is stricter than a GPU where that finds mistakes. Threads run one after the other, each warp as far as it gets
// before the next one starts, in ascending or in descending order: a missing barrier then reads what has not been
// written. Shared memory starts as NaN. An asynchronous copy poisons its destination when it is issued and delivers
// only when it is waited for. Writing past the shared memory that was asked for aborts.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define MIXOUT_DEVICE inline
#define MIXOUT_KERNEL(threads, blocks) void
#define MIXOUT_PARAMETER const

struct float4 {
  float x, y, z, w;
};

namespace mixout::cuda {

namespace emulation {

struct Options {
  bool descending = false;       // the order of blocks and threads
  int shared_bytes = 99 * 1024;  // the most a block can ask for: what sm_86, sm_89 and sm_120 have
};
inline Options options;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t first;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started, finished;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is not committed yet
};

// What the lanes of a warp show each other. Two of them in turn: a lane can be one operation ahead of its warp.
struct Exchange {
  uint32_t value[2][kWarpSize];
  const void* row[2][kWarpSize];
  uint32_t a[2][kWarpSize][4], b[2][kWarpSize][2];
  float product[2][16][8];
  unsigned turn[kWarpSize];
  Barrier barrier;
};

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xFF;

struct Machine {
  int64_t block[3], blocks[3];
  int threads, current, finished;
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  Barrier barrier;
  std::unique_ptr<Vector128[]> shared;
  std::function<void()> body;
  jmp_buf done;
};
inline Machine machine;

inline int thread() { return options.descending ? machine.threads - 1 - machine.current : machine.current; }
inline Exchange& warp() { return machine.warps[thread() / kWarpSize]; }
inline Fiber& fiber() { return machine.fibers[machine.current]; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "mixout_kernels emulation: %s\n", what);
  std::abort();
}

inline void resume(int next) {
  machine.current = next;
  Fiber& to = machine.fibers[next];
  // ucontext only starts a fiber; its switches save the signal mask, a system call each.
  if (to.started) _longjmp(to.resume, 1);
  to.started = true;
  setcontext(&to.first);
}

// The next unfinished fiber of the `size` ones from `first` on, in a ring.
inline void yield(int first, int size) {
  int next = machine.current;
  do next = first + (next - first + 1) % size;
  while (machine.fibers[next].finished);
  if (next != machine.current && _setjmp(fiber().resume) == 0) resume(next);
}

inline void wait(Barrier& barrier, int first, int size) {
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const unsigned generation = barrier.generation;
  for (int64_t spins = 0; barrier.generation == generation; ++spins) {
    if (spins == 100'000) fail("a barrier was not reached by all threads");
    yield(first, size);
  }
}

// Deposits with `show`, waits for the warp; `last` runs once, in the lane that arrives last. Returns the turn.
template <typename Show, typename Last>
unsigned exchange(const Show& show, const Last& last) {
  Exchange& own = warp();
  const int lane = thread() % kWarpSize;
  const unsigned turn = own.turn[lane]++ % 2;
  show(own, turn, lane);
  if (own.barrier.arrived == kWarpSize - 1) last(own, turn);
  wait(own.barrier, machine.current / kWarpSize * kWarpSize, kWarpSize);
  return turn;
}

inline void run_fiber() {
  machine.body();
  fiber().finished = true;
  if (++machine.finished == machine.threads) _longjmp(machine.done, 1);
  int next = machine.current;
  do next = (next + 1) % machine.threads;
  while (machine.fibers[next].finished);
  resume(next);
}

inline void run_block(int shared_bytes) {
  auto* memory = reinterpret_cast<unsigned char*>(machine.shared.get());
  std::memset(memory, kPoison, shared_bytes + kGuardBytes);
  machine.finished = 0;
  machine.barrier = {};
  machine.warps.assign(machine.threads / kWarpSize, Exchange{});
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& f = machine.fibers[i];
    if (!f.stack) f.stack = std::make_unique<char[]>(kStackBytes);
    f.started = f.finished = false;
    f.copies.assign(1, {});
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = f.stack.get();
    f.first.uc_stack.ss_size = kStackBytes;
    f.first.uc_link = nullptr;
    makecontext(&f.first, run_fiber, 0);
  }
  if (_setjmp(machine.done) == 0) resume(0);
  for (int i = 0; i < kGuardBytes; ++i)
    if (memory[shared_bytes + i] != kPoison) fail("a kernel wrote past its shared memory");
}

// Blocks run one after the other.
template <typename Body>
void run_grid(const int64_t (&blocks)[3], int threads, int shared_bytes, const Body& body) {
  if (threads % kWarpSize != 0) fail("a block is not a whole number of warps");
  if (shared_bytes > options.shared_bytes) fail("a kernel asks for more shared memory than the device has");
  machine.threads = threads;
  machine.fibers.resize(std::max<size_t>(machine.fibers.size(), threads));
  machine.shared = std::make_unique<Vector128[]>((shared_bytes + kGuardBytes) / sizeof(Vector128) + 1);
  machine.body = body;
  std::copy(blocks, blocks + 3, machine.blocks);
  const int64_t count = blocks[0] * blocks[1] * blocks[2];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = options.descending ? count - 1 - i : i;
    machine.block[0] = block % blocks[0];
    machine.block[1] = block / blocks[0] % blocks[1];
    machine.block[2] = block / blocks[0] / blocks[1];
    run_block(shared_bytes);
  }
}

}  // namespace emulation

inline int thread_index() { return emulation::thread(); }
inline int64_t block_x() { return emulation::machine.block[0]; }
inline int64_t block_y() { return emulation::machine.block[1]; }
inline int64_t block_z() { return emulation::machine.block[2]; }
inline int64_t blocks_x() { return emulation::machine.blocks[0]; }
inline int64_t blocks_y() { return emulation::machine.blocks[1]; }
inline int64_t blocks_z() { return emulation::machine.blocks[2]; }

inline void synchronize_block() { emulation::wait(emulation::machine.barrier, 0, emulation::machine.threads); }
inline void device_fence() {}
inline uint32_t atomic_add(uint32_t* counter, uint32_t value) {
  const uint32_t before = *counter;
  *counter += value;
  return before;
}
inline uint32_t warp_sum(uint32_t value) {
  const unsigned turn = emulation::exchange([=](auto& e, unsigned t, int lane) { e.value[t][lane] = value; },
                                            [](auto&, unsigned) {});
  uint32_t sum = 0;
  for (const uint32_t v : emulation::warp().value[turn]) sum += v;
  return sum;
}
inline uint32_t warp_ballot(bool predicate) {
  return warp_sum(predicate ? 1u << thread_index() % kWarpSize : 0u);
}
inline uint32_t count_bits(uint32_t word) { return static_cast<uint32_t>(__builtin_popcount(word)); }
inline float4 load_coherent(const float4* from) { return *from; }
inline int64_t load_acquire(const int64_t* from) { return *from; }
inline void store_vector(Vector128* to, const Vector128& vector) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::fail("a vector is not stored at a multiple of 16 bytes");
  *to = vector;
}
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulation::machine.shared.get()); }

inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulation::fail("an asynchronous copy is not aligned to 16 bytes");
  std::memset(shared, emulation::kPoison, 16);
  emulation::fiber().copies.back().push_back({shared, global, bytes});
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
      half[k] = static_cast<const uint16_t*>(emulation::warp().row[turn][8 * i + r])[c];
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
  for (int i = 0; i < 4; ++i) d[i] += emulation::warp().product[turn][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace mixout::cuda
