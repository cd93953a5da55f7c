// The machine that host_emulation.h runs kernels on: blocks of fibers, one for each thread, on one thread of the host.
//
// It is stricter than a GPU where that finds mistakes. A fiber runs until it has to wait, so what it reads too early has
// not been written; shared memory starts as NaN, and writing past what was asked for aborts. In the random order, which
// is the default, a few blocks taken from anywhere in the grid are resident at a time, and every operation that others
// can notice may hand the machine to any other warp. In the two plain orders blocks run one after the other, and each
// warp runs as far as it gets before the next one starts.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <unordered_map>
#include <vector>

#include <ucontext.h>

struct float4 {
  float x, y, z, w;
};

namespace mixout::cuda::emulation {

enum class Order { ascending, descending, random };

struct Options {
  Order order = Order::random;
  int shared_bytes = 99 * 1024;  // the most a block can ask for: what sm_86, sm_89 and sm_120 have
};
inline Options options;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Store {
  float4* to;
  float4 value;
};

struct Fiber {
  ucontext_t first;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
  std::vector<std::vector<Copy>> copies;          // groups; the last one is not committed yet
  std::vector<Store> stores;                       // that no other thread sees yet
  uint64_t seen;                                   // publications up to this one are visible to it
};

// What the lanes of a warp show each other. Two of them in turn: a lane can be one operation ahead of its warp.
struct Exchange {
  uint32_t value[2][kWarpSize];
  const void* row[2][kWarpSize];
  uint32_t a[2][kWarpSize][4], b[2][kWarpSize][2];
  float product[2][16][8];
  unsigned turn[kWarpSize];
  int arrived;
};

struct Warp {
  uint32_t ready;  // a bit for each lane that does not wait
  Exchange exchange;
};

struct Block {
  int64_t index[3];
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived, finished;
  uint64_t acquired;  // what was published when it had its last atomic operation: what its fences let it see
  std::unique_ptr<Vector128[]> shared;
};

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xFF;
constexpr int kMostResident = 4;

struct Machine {
  int64_t blocks[3];
  int threads, shared_bytes;
  std::function<void()> body;
  std::vector<int64_t> waiting;  // blocks that have not started, the next one last
  Block resident[kMostResident];
  int slots, active;
  int block, thread;  // that runs now
  uint64_t random_state = 1;
  std::unordered_map<const void*, uint64_t> published;  // addresses, and when, counted over the launch
  uint64_t publications;
  std::vector<Store> unfenced;  // what finished threads never published: it is visible after the launch
  jmp_buf done;
};
inline Machine machine;

inline Block& block() { return machine.resident[machine.block]; }
inline Fiber& fiber() { return block().fibers[machine.thread]; }
inline Warp& warp() { return block().warps[machine.thread / kWarpSize]; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "mixout_kernels emulation: %s\n", what);
  std::abort();
}

// Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
inline uint32_t random_below(uint32_t n) {
  uint64_t z = machine.random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((z >> 32) * n >> 32);
}

inline int choose_lane(uint32_t ready) {
  if (options.order == Order::ascending) return __builtin_ctz(ready);
  if (options.order == Order::descending) return 31 - __builtin_clz(ready);
  const uint32_t first = random_below(kWarpSize);
  const uint32_t rotated = ready >> first | ready << (kWarpSize - first) % kWarpSize;
  return (first + __builtin_ctz(rotated)) % kWarpSize;
}

// Switches to a fiber that does not wait; `stay`: to one of the same warp, if there is any.
[[noreturn]] inline void run_next(bool stay) {
  const bool random = options.order == Order::random;
  const int warps = machine.threads / kWarpSize, count = machine.slots * warps;
  const int direction = options.order == Order::descending ? count - 1 : 1;
  int next = machine.block * warps + machine.thread / kWarpSize;
  if (random && !(stay && warp().ready != 0)) next = static_cast<int>(random_below(count));
  for (int i = 0; i < count; ++i, next = (next + direction) % count) {
    const uint32_t ready = machine.resident[next / warps].warps[next % warps].ready;
    if (ready == 0) continue;
    machine.block = next / warps;
    machine.thread = next % warps * kWarpSize + choose_lane(ready);
    // ucontext only starts a fiber; its switches save the signal mask, a system call each.
    if (fiber().started) _longjmp(fiber().resume, 1);
    fiber().started = true;
    setcontext(&fiber().first);
  }
  if (machine.active == 0) _longjmp(machine.done, 1);
  fail("a barrier was not reached by all threads");
}

inline void pause(bool stay) {
  if (_setjmp(fiber().resume) == 0) run_next(stay);
}

// The current fiber waits, until someone sets its bit again.
inline void wait() {
  warp().ready &= ~(1u << machine.thread % kWarpSize);
  pause(true);
}

// At every operation that another thread can notice.
inline void maybe_switch() {
  if (options.order == Order::random && random_below(16) == 0) pause(false);
}

inline void wait_for_block() {
  if (++block().arrived == machine.threads) {
    block().arrived = 0;
    for (Warp& warp : block().warps) warp.ready = ~0u;
  } else {
    wait();
  }
  maybe_switch();
}

// Deposits with `show`, waits for the warp; `last` runs once, in the lane that arrives last. Returns the turn.
template <typename Show, typename Last>
unsigned exchange(const Show& show, const Last& last) {
  Exchange& own = warp().exchange;
  const int lane = machine.thread % kWarpSize;
  const unsigned turn = own.turn[lane]++ % 2;
  show(own, turn, lane);
  if (++own.arrived == kWarpSize) {
    last(own, turn);
    own.arrived = 0;
    warp().ready = ~0u;
    maybe_switch();
  } else {
    wait();
  }
  return turn;
}

// A fence: what this thread has stored is published, and it sees what had been when its block's atomic operation was.
inline void publish() {
  for (const auto& [to, value] : fiber().stores) {
    *to = value;
    machine.published[to] = ++machine.publications;
  }
  fiber().stores.clear();
  fiber().seen = block().acquired;
}

// Puts the next block into a slot, if there is one.
inline void start_block(int slot) {
  Block& next = machine.resident[slot];
  next.warps.assign(machine.threads / kWarpSize, Warp{});
  if (machine.waiting.empty()) return;
  const int64_t index = machine.waiting.back();
  machine.waiting.pop_back();
  next.index[0] = index % machine.blocks[0];
  next.index[1] = index / machine.blocks[0] % machine.blocks[1];
  next.index[2] = index / machine.blocks[0] / machine.blocks[1];
  next.arrived = next.finished = 0;
  next.acquired = 0;
  std::memset(next.shared.get(), kPoison, machine.shared_bytes + kGuardBytes);
  for (Warp& warp : next.warps) warp.ready = ~0u;
  for (int t = 0; t < machine.threads; ++t) {
    next.fibers[t].copies.assign(1, {});
    next.fibers[t].seen = 0;
  }
  ++machine.active;
}

inline void finish_block() {
  const auto* memory = reinterpret_cast<const unsigned char*>(block().shared.get());
  for (int i = 0; i < kGuardBytes; ++i)
    if (memory[machine.shared_bytes + i] != kPoison) fail("a kernel wrote past its shared memory");
  --machine.active;
  start_block(machine.block);
}

// A fiber serves its thread in one block after the other.
inline void run_fiber() {
  for (;;) {
    machine.body();
    auto& stores = fiber().stores;
    machine.unfenced.insert(machine.unfenced.end(), stores.begin(), stores.end());
    stores.clear();
    warp().ready &= ~(1u << machine.thread % kWarpSize);
    if (++block().finished == machine.threads) finish_block();
    pause(true);
  }
}

inline void prepare_slot(Block& slot) {
  slot.shared = std::make_unique<Vector128[]>((machine.shared_bytes + kGuardBytes) / sizeof(Vector128) + 1);
  if (slot.fibers.size() < static_cast<size_t>(machine.threads)) slot.fibers.resize(machine.threads);
  for (Fiber& fiber : slot.fibers) {
    if (fiber.stack) continue;
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStackBytes;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, run_fiber, 0);
  }
}

template <typename Body>
void run_grid(const int64_t (&blocks)[3], int threads, int shared_bytes, const Body& body) {
  if (threads % kWarpSize != 0) fail("a block is not a whole number of warps");
  if (shared_bytes > options.shared_bytes) fail("a kernel asks for more shared memory than the device has");
  const bool random = options.order == Order::random;
  std::copy(blocks, blocks + 3, machine.blocks);
  machine.threads = threads;
  machine.shared_bytes = shared_bytes;
  machine.body = body;
  machine.published.clear();
  machine.publications = 0;
  machine.waiting.resize(blocks[0] * blocks[1] * blocks[2]);
  std::iota(machine.waiting.begin(), machine.waiting.end(), 0);
  if (options.order == Order::ascending) std::reverse(machine.waiting.begin(), machine.waiting.end());
  for (size_t i = machine.waiting.size(); random && i > 1; --i)
    std::swap(machine.waiting[i - 1], machine.waiting[random_below(static_cast<uint32_t>(i))]);
  machine.slots = random ? 1 + random_below(kMostResident) : 1;
  machine.block = machine.thread = machine.active = 0;
  for (int slot = 0; slot < machine.slots; ++slot) {
    prepare_slot(machine.resident[slot]);
    start_block(slot);
  }
  if (options.order == Order::descending) machine.thread = threads - 1;
  if (_setjmp(machine.done) == 0) run_next(false);
  for (const Store& store : machine.unfenced) *store.to = store.value;
  machine.unfenced.clear();
}

}  // namespace mixout::cuda::emulation
