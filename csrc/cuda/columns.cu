// Kept columns at a static capacity: x[:, kept] for the dw product, and its result spread over dw again. Where a kept
// column goes is its rank among the kept ones, which every block works out for itself: that is one Philox call per
// thread for 1024 features, less than the launch a table in memory would take, and the host never sees the number.
#include <algorithm>

#include "keep_bits.h"
#include "kernels.h"
#include "launch.h"
#include "types.h"

namespace mixout::cuda {

namespace {

constexpr int kColumnThreads = 256, kColumnWarps = kColumnThreads / kWarpSize;

// The number of kept features below `end`, a multiple of four; for all threads of the block.
MIXOUT_DEVICE int64_t kept_below(const Mask& mask, uint64_t seed, int64_t end) {
  uint32_t count = 0;
  for (int64_t group = thread_index(); group < end / 4; group += kColumnThreads)
    count += count_bits(keep_bits<4>(seed, mask.strides.offset + 4 * group, mask.threshold));
  auto* of_warp = reinterpret_cast<uint32_t*>(shared_memory());
  count = warp_sum(count);
  if (thread_index() % kWarpSize == 0) of_warp[thread_index() / kWarpSize] = count;
  synchronize_block();
  int64_t sum = 0;
  for (int w = 0; w < kColumnWarps; ++w) sum += of_warp[w];
  synchronize_block();
  return sum;
}

struct Slot {
  bool keep;
  int64_t rank;        // this thread's feature among the kept ones
  int64_t kept_after;  // kept features up to the end of the block's
};

// For a block whose thread t owns feature first + t.
MIXOUT_DEVICE Slot find_slot(const Mask& mask, int64_t first, int64_t features) {
  const uint64_t seed = seed_value(mask.seed);
  const int64_t before = kept_below(mask, seed, first);
  const int64_t j = first + thread_index();
  const bool keep = j < features && mask_word(seed, mask.strides.offset + j) >= mask.threshold;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const uint32_t ballot = warp_ballot(keep);
  auto* of_warp = reinterpret_cast<uint32_t*>(shared_memory());
  if (lane == 0) of_warp[warp] = count_bits(ballot);
  synchronize_block();
  Slot slot{keep, before + count_bits(ballot & ((1u << lane) - 1)), before};
  for (int w = 0; w < kColumnWarps; ++w) {
    if (w < warp) slot.rank += of_warp[w];
    slot.kept_after += of_warp[w];
  }
  return slot;
}

struct ColumnArguments {
  Mask mask;
  int64_t rows, features, capacity, rows_per_block;
};

template <typename T>
MIXOUT_KERNEL(kColumnThreads, 4)
gather_kept_kernel(ColumnArguments a, const T* __restrict__ x, T* __restrict__ compact) {
  const int64_t first = block_x() * kColumnThreads;
  const Slot slot = find_slot(a.mask, first, a.features);
  const int64_t begin = block_y() * a.rows_per_block, end = min_of(begin + a.rows_per_block, a.rows);
  if (slot.keep && slot.rank < a.capacity) {
    const T* from = x + begin * a.features + first + thread_index();
    T* to = compact + begin * a.capacity + slot.rank;
#pragma unroll 4
    for (int64_t r = begin; r < end; ++r, from += a.features, to += a.capacity) *to = *from;
  }
  if (block_x() == blocks_x() - 1)
    for (int64_t r = begin; r < end; ++r)
      for (int64_t k = slot.kept_after + thread_index(); k < a.capacity; k += kColumnThreads)
        compact[r * a.capacity + k] = from_float<T>(0);
}

template <typename T, typename O>
MIXOUT_KERNEL(kColumnThreads, 4)
scatter_kept_kernel(ColumnArguments a, const T* __restrict__ compact, O* __restrict__ dw, float scale) {
  const int64_t j = block_x() * kColumnThreads + thread_index();
  const Slot slot = find_slot(a.mask, block_x() * kColumnThreads, a.features);
  if (j >= a.features) return;
  const int64_t begin = block_y() * a.rows_per_block, end = min_of(begin + a.rows_per_block, a.rows);
  const bool has_gradient = slot.keep && slot.rank < a.capacity;
  const T* from = compact + begin * a.capacity + slot.rank;
  O* to = dw + begin * a.features + j;
#pragma unroll 4
  for (int64_t r = begin; r < end; ++r, from += a.capacity, to += a.features)
    *to = from_float<O>(has_gradient ? scale * to_float(*from) : 0.0f);
}

// dw [features, rows]: each warp writes the line of one feature.
template <typename T, typename O>
MIXOUT_KERNEL(kColumnThreads, 4)
scatter_kept_lines_kernel(ColumnArguments a, const T* __restrict__ compact, O* __restrict__ dw, float scale) {
  const uint64_t seed = seed_value(a.mask.seed);
  const int64_t first = block_x() * kColumnWarps;
  const int64_t before = kept_below(a.mask, seed, first);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int64_t j = first + warp;
  if (j >= a.features) return;
  const uint32_t bits = keep_bits<kColumnWarps>(seed, a.mask.strides.offset + first, a.mask.threshold);
  const int64_t rank = before + count_bits(bits & ((1u << warp) - 1));
  const bool has_gradient = (bits >> warp & 1) != 0 && rank < a.capacity;
  const T* from = compact + rank * a.rows;
  O* to = dw + j * a.rows;
#pragma unroll 4
  for (int64_t r = lane; r < a.rows; r += kWarpSize)
    to[r] = from_float<O>(has_gradient ? scale * to_float(from[r]) : 0.0f);
}

// A block works out its ranks once for all its rows; 32 rows make that a small part of the block's work, 65535 is the
// most blocks along y.
Grid column_grid(int64_t rows, int64_t features, int64_t& rows_per_block) {
  rows_per_block = std::max<int64_t>(32, divide_up(rows, 65535));
  return {divide_up(features, kColumnThreads), divide_up(rows, rows_per_block)};
}

constexpr int kSharedBytes = kColumnWarps * sizeof(uint32_t);

}  // namespace

void gather_kept(
    const Mask& mask, const void* x, void* compact, Type type, int64_t rows, int64_t features, int64_t capacity,
    void* stream) {
  if (rows == 0 || features == 0 || capacity == 0) return;
  ColumnArguments arguments{mask, rows, features, capacity, 0};
  const Grid grid = column_grid(rows, features, arguments.rows_per_block);
  dispatch(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("gather_kept", gather_kept_kernel<T>, grid, kColumnThreads, kSharedBytes, stream, arguments,
           static_cast<const T*>(x), static_cast<T*>(compact));
  });
}

void scatter_kept(
    const Mask& mask, const void* compact, void* dw, Type compact_type, Type dw_type, float scale, int64_t rows,
    int64_t features, int64_t capacity, bool transposed, void* stream) {
  if (rows == 0 || features == 0) return;
  ColumnArguments arguments{mask, rows, features, capacity, 0};
  const Grid grid = transposed ? Grid{divide_up(features, kColumnWarps)}
                               : column_grid(rows, features, arguments.rows_per_block);
  dispatch_widening(compact_type, dw_type, [&](auto from, auto to) {
    using T = typename decltype(from)::type;
    using O = typename decltype(to)::type;
    const auto kernel = transposed ? scatter_kept_lines_kernel<T, O> : scatter_kept_kernel<T, O>;
    launch("scatter_kept", kernel, grid, kColumnThreads, kSharedBytes, stream, arguments,
           static_cast<const T*>(compact), static_cast<O*>(dw), scale);
  });
}

namespace {

// Each thread decides four neighbours in memory.
MIXOUT_KERNEL(kColumnThreads, 4) keep_mask_kernel(Mask mask, bool* out, int64_t numel, int64_t columns) {
  const int64_t first = (block_x() * kColumnThreads + thread_index()) * 4;
  if (first >= numel) return;
  const uint64_t seed = seed_value(mask.seed);
  const int count = static_cast<int>(min_of<int64_t>(numel - first, 4));
  if (mask.inner == 1 && mask.strides.column == 1 && (mask.strides.row == columns || columns == numel)) {
    const uint32_t bits = keep_bits<4>(seed, mask.strides.index(0, first), mask.threshold);
    for (int k = 0; k < count; ++k) out[first + k] = (bits >> k & 1) != 0;
    return;
  }
#pragma unroll 1
  for (int64_t i = first; i < first + count; ++i)
    out[i] = mask_word(seed, mask.strides.index(i / columns, i % columns / mask.inner)) >= mask.threshold;
}

}  // namespace

void keep_mask(const Mask& mask, bool* out, int64_t rows, int64_t columns, void* stream) {
  const int64_t numel = rows * columns;
  if (numel == 0) return;
  launch("keep_mask", keep_mask_kernel, {divide_up(numel, 4 * kColumnThreads)}, kColumnThreads, 0, stream, mask, out,
         numel, columns);
}

}  // namespace mixout::cuda
