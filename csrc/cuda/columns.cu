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

struct Ranks {
  int64_t before_warp;  // kept features before those of this warp
  int64_t after_block;  // and up to the end of the block's
};

// For a block whose features begin at `first`, a multiple of four; `of_warp` counts the kept ones of this warp.
MIXOUT_DEVICE Ranks find_ranks(const Mask& mask, uint64_t seed, int64_t first, uint32_t of_warp) {
  uint32_t below = 0;
  for (int64_t group = thread_index(); group < first / 4; group += kColumnThreads)
    below += count_bits(keep_bits<4>(seed, mask.strides.offset + 4 * group, mask.threshold));
  below = warp_sum(below);
  const int warp = thread_index() / kWarpSize;
  auto* counts = reinterpret_cast<uint32_t*>(shared_memory());
  if (thread_index() % kWarpSize == 0) {
    counts[warp] = below;
    counts[kColumnWarps + warp] = of_warp;
  }
  synchronize_block();
  Ranks ranks{0, 0};
  for (int w = 0; w < kColumnWarps; ++w) {
    ranks.before_warp += counts[w] + (w < warp ? counts[kColumnWarps + w] : 0);
    ranks.after_block += counts[w] + counts[kColumnWarps + w];
  }
  return ranks;
}

MIXOUT_DEVICE uint32_t count_before_lane(uint32_t ballot) {
  return count_bits(ballot & ((1u << thread_index() % kWarpSize) - 1));
}

struct ColumnArguments {
  Mask mask;
  int64_t rows, features, capacity;
  uint32_t blocks_across;  // how many have the same rows
};

// A block works out its ranks once for all its rows: so many make that a small part of its work.
constexpr int kGatherRows = 32, kScatterRows = 8;

// Two threads have a row of g each time: what they read is one sector of memory.
template <typename T>
constexpr int kSumVector = sizeof(Vector128) / sizeof(T);
template <typename T>
constexpr int kSumColumns = 2 * kSumVector<T>;
constexpr int kSumRows = kColumnThreads / 2;
constexpr int kSumAtOnce = 8;  // vectors that a thread asks for before it waits for any

struct SumArguments {
  ColumnSums of;
  int64_t columns;
  uint32_t blocks;  // the first ones of the launch, since they take longest
  bool aligned;
};

template <typename T>
MIXOUT_DEVICE void add_rows(const SumArguments& a, int64_t column, float (&sum)[kSumVector<T>]) {
  const int64_t first = thread_index() / 2, step = kSumRows * a.of.stride;
  const T* g = static_cast<const T*>(a.of.g) + first * a.of.stride + column;
  if (a.aligned && column < a.columns) {
    for (int64_t r = first; r < a.of.rows; r += kSumAtOnce * kSumRows) {
      Vector128 loaded[kSumAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kSumAtOnce; ++i, g += step)
        if (r + i * kSumRows < a.of.rows) loaded[i] = *reinterpret_cast<const Vector128*>(g);
#pragma unroll
      for (int i = 0; i < kSumAtOnce; ++i) {
        float value[kSumVector<T>];
        unpack_vector<T>(loaded[i], value);
        for (int k = 0; k < kSumVector<T>; ++k) sum[k] += value[k];
      }
    }
  } else {
#pragma unroll 1
    for (int64_t r = first; r < a.of.rows; r += kSumRows, g += step)
      for (int k = 0; k < kSumVector<T>; ++k)
        if (column + k < a.columns) sum[k] += to_float(g[k]);
  }
}

// The sums of kSumColumns columns, whose order no size of a grid changes.
template <typename T>
MIXOUT_DEVICE void sum_columns(const SumArguments& a, int64_t block) {
  constexpr int kColumns = kSumColumns<T>, kParts = kColumnThreads / kColumns, kOfPart = kSumRows / kParts;
  const int64_t first = block * kColumns;
  const int thread = thread_index(), own = thread % 2 * kSumVector<T>;
  float sum[kSumVector<T>] = {};
  add_rows<T>(a, first + own, sum);
  auto* rows = reinterpret_cast<float*>(shared_memory());
  for (int k = 0; k < kSumVector<T>; ++k) rows[thread / 2 * kColumns + own + k] = sum[k];
  synchronize_block();
  float part = 0;
  for (int i = 0; i < kOfPart; ++i) part += rows[(thread / kColumns * kOfPart + i) * kColumns + thread % kColumns];
  float* parts = rows + kSumRows * kColumns;
  parts[thread] = part;
  synchronize_block();
  if (thread >= kColumns || first + thread >= a.columns) return;
  float total = 0;
  for (int i = 0; i < kParts; ++i) total += parts[i * kColumns + thread];
  if (a.of.type == Type::float32) static_cast<float*>(a.of.sums)[first + thread] = total;
  else static_cast<T*>(a.of.sums)[first + thread] = from_float<T>(total);
}

// Thread t owns feature t of the block's: of its rows it moves one element each, sixteen of them at a time.
template <typename T>
MIXOUT_KERNEL(kColumnThreads, 4)
gather_kept_kernel(ColumnArguments a, const T* __restrict__ x, T* __restrict__ compact) {
  const uint64_t seed = seed_value(a.mask.seed);
  const uint32_t block = static_cast<uint32_t>(block_x()), across = block % a.blocks_across;
  const int64_t first = static_cast<int64_t>(across) * kColumnThreads, j = first + thread_index();
  const bool keep = j < a.features && mask_word(seed, a.mask.strides.offset + j) >= a.mask.threshold;
  const uint32_t ballot = warp_ballot(keep);
  const Ranks ranks = find_ranks(a.mask, seed, first, count_bits(ballot));
  const int64_t rank = ranks.before_warp + count_before_lane(ballot);
  const int64_t begin = static_cast<int64_t>(block / a.blocks_across) * kGatherRows;
  const int64_t end = min_of(begin + kGatherRows, a.rows);
  if (keep && rank < a.capacity) {
    const T* from = x + begin * a.features + j;
    T* to = compact + begin * a.capacity + rank;
#pragma unroll 16
    for (int64_t r = begin; r < end; ++r, from += a.features, to += a.capacity) *to = *from;
  }
  if (across == a.blocks_across - 1)
    for (int64_t r = begin; r < end; ++r)
      for (int64_t k = ranks.after_block + thread_index(); k < a.capacity; k += kColumnThreads)
        compact[r * a.capacity + k] = from_float<T>(0);
}

// Neighbours that a thread of scatter owns: one Philox call decides them, and one store writes them.
constexpr int kOwned = 4;
constexpr int kScatterColumns = kColumnThreads * kOwned;
constexpr int kAtOnce = 4;  // vectors of kOwned elements that a thread asks for before it waits for any

template <typename T>
struct alignas(kOwned * sizeof(T)) Owned {
  T value[kOwned];
};

template <typename T>
MIXOUT_DEVICE Owned<T> load_owned(const T* from, bool aligned, int64_t count) {
  if (aligned) return *reinterpret_cast<const Owned<T>*>(from);
  Owned<T> owned{};
#pragma unroll
  for (int k = 0; k < kOwned; ++k)
    if (k < count) owned.value[k] = from[k];
  return owned;
}

template <typename T, typename O>
MIXOUT_DEVICE void store_scaled(O* to, const Owned<T>& owned, float scale, bool aligned, int64_t count) {
  float value[kOwned];
#pragma unroll
  for (int k = 0; k < kOwned; ++k) value[k] = scale * to_float(owned.value[k]);
  if (!aligned) {
#pragma unroll
    for (int k = 0; k < kOwned; ++k)
      if (k < count) to[k] = from_float<O>(value[k]);
  } else if constexpr (sizeof(O) == 4) {
    store_vector(reinterpret_cast<Vector128*>(to), pack_vector<O>(value));
  } else {
    store_vector(reinterpret_cast<Vector64*>(to), {pack<O>(value[0], value[1]), pack<O>(value[2], value[3])});
  }
}

// The next rows of the columns from j on, whose gradients lie at `from`.
template <int kRows, typename T, typename O>
MIXOUT_DEVICE void scatter_rows(
    const ColumnArguments& a, const T* (&from)[kOwned], const bool (&has_gradient)[kOwned], O*& to, float scale,
    bool aligned, int64_t j) {
  Owned<T> loaded[kRows] = {};
#pragma unroll
  for (int k = 0; k < kOwned; ++k)
#pragma unroll
    for (int i = 0; i < kRows; ++i, from[k] += a.capacity)
      if (has_gradient[k]) loaded[i].value[k] = *from[k];
#pragma unroll
  for (int i = 0; i < kRows; ++i, to += a.features) store_scaled(to, loaded[i], scale, aligned, a.features - j);
}

template <typename T, typename O>
MIXOUT_KERNEL(kColumnThreads, 4)
scatter_kept_kernel(
    ColumnArguments a, SumArguments sums, const T* __restrict__ compact, O* __restrict__ dw, float scale,
    bool aligned) {
  if (block_x() < sums.blocks) return sum_columns<T>(sums, block_x());
  const uint64_t seed = seed_value(a.mask.seed);
  const uint32_t block = static_cast<uint32_t>(block_x()) - sums.blocks;
  const int64_t first = static_cast<int64_t>(block % a.blocks_across) * kScatterColumns;
  const int64_t j = first + thread_index() * kOwned;
  const uint32_t bits = keep_bits<kOwned>(seed, a.mask.strides.offset + j, a.mask.threshold);
  uint32_t before = 0, of_warp = 0;
#pragma unroll
  for (int k = 0; k < kOwned; ++k) {
    const uint32_t ballot = warp_ballot((bits >> k & 1) != 0);
    before += count_before_lane(ballot);
    of_warp += count_bits(ballot);
  }
  const int64_t rank = find_ranks(a.mask, seed, first, of_warp).before_warp + before;
  if (j >= a.features) return;
  const int64_t begin = static_cast<int64_t>(block / a.blocks_across) * kScatterRows;
  const int64_t end = min_of(begin + kScatterRows, a.rows);
  const T* from[kOwned];
  bool has_gradient[kOwned];
#pragma unroll
  for (int k = 0; k < kOwned; ++k) {
    const int64_t of_column = rank + count_bits(bits & ((1u << k) - 1));
    has_gradient[k] = (bits >> k & 1) != 0 && j + k < a.features && of_column < a.capacity;
    from[k] = compact + begin * a.capacity + of_column;
  }
  O* to = dw + begin * a.features + j;
  int64_t r = begin;
  for (; r + kAtOnce <= end; r += kAtOnce) scatter_rows<kAtOnce>(a, from, has_gradient, to, scale, aligned, j);
#pragma unroll 1
  for (; r < end; ++r) scatter_rows<1>(a, from, has_gradient, to, scale, aligned, j);
}

// dw [features, rows]: each warp writes the line of one feature, each lane four neighbours of it.
template <typename T, typename O>
MIXOUT_KERNEL(kColumnThreads, 4)
scatter_kept_lines_kernel(
    ColumnArguments a, SumArguments sums, const T* __restrict__ compact, O* __restrict__ dw, float scale,
    bool aligned) {
  if (block_x() < sums.blocks) return sum_columns<T>(sums, block_x());
  const uint64_t seed = seed_value(a.mask.seed);
  const int64_t first = (block_x() - sums.blocks) * kColumnWarps, j = first + thread_index() / kWarpSize;
  const bool keep = mask_word(seed, a.mask.strides.offset + j) >= a.mask.threshold;
  const int64_t rank = find_ranks(a.mask, seed, first, keep).before_warp;
  if (j >= a.features) return;
  const bool has_gradient = keep && rank < a.capacity;
  const T* from = compact + rank * a.rows;
  O* to = dw + j * a.rows;
  constexpr int kStep = kWarpSize * kOwned;
  for (int64_t r = thread_index() % kWarpSize * kOwned; r < a.rows; r += kAtOnce * kStep) {
    Owned<T> loaded[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (has_gradient && r + i * kStep < a.rows)
        loaded[i] = load_owned(from + r + i * kStep, aligned, a.rows - r - i * kStep);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (r + i * kStep < a.rows)
        store_scaled(to + r + i * kStep, loaded[i], scale, aligned, a.rows - r - i * kStep);
  }
}

constexpr int kSharedBytes = 2 * kColumnWarps * sizeof(uint32_t);
template <typename T>
constexpr int kSumBytes = (kSumRows * kSumColumns<T> + kColumnThreads) * sizeof(float);

template <typename T>
SumArguments sum_arguments(const ColumnSums& sums, int64_t columns) {
  const bool aligned = reinterpret_cast<uintptr_t>(sums.g) % sizeof(Vector128) == 0 &&
      columns % kSumVector<T> == 0 && sums.stride % kSumVector<T> == 0;
  return {sums, columns, sums.g ? static_cast<uint32_t>(divide_up(columns, kSumColumns<T>)) : 0, aligned};
}

template <typename T>
bool is_whole_multiple(const T* address, int64_t length) {
  return reinterpret_cast<uintptr_t>(address) % (kOwned * sizeof(T)) == 0 && length % kOwned == 0;
}

}  // namespace

void gather_kept(
    const Mask& mask, const void* x, void* compact, Type type, int64_t rows, int64_t features, int64_t capacity,
    void* stream) {
  if (rows == 0 || features == 0 || capacity == 0) return;
  const int64_t across = divide_up(features, kColumnThreads);
  const ColumnArguments arguments{mask, rows, features, capacity, static_cast<uint32_t>(across)};
  dispatch(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("gather_kept", gather_kept_kernel<T>, {across * divide_up(rows, kGatherRows)}, kColumnThreads, kSharedBytes, stream, arguments,
           static_cast<const T*>(x), static_cast<T*>(compact));
  });
}

void scatter_kept(
    const Mask& mask, const void* compact, void* dw, Type compact_type, Type dw_type, float scale, int64_t rows,
    int64_t features, int64_t capacity, bool transposed, const ColumnSums& sums, void* stream) {
  if (rows == 0 || (features == 0 && sums.g == nullptr)) return;
  if (sums.g && sums.type != compact_type && sums.type != Type::float32) no_kernel();
  const int64_t across = divide_up(features, kScatterColumns);
  const ColumnArguments arguments{mask, rows, features, capacity, static_cast<uint32_t>(across)};
  const int64_t blocks = transposed ? divide_up(features, kColumnWarps) : across * divide_up(rows, kScatterRows);
  dispatch_widening(compact_type, dw_type, [&](auto from, auto to) {
    using T = typename decltype(from)::type;
    using O = typename decltype(to)::type;
    const auto kernel = transposed ? scatter_kept_lines_kernel<T, O> : scatter_kept_kernel<T, O>;
    const T* source = static_cast<const T*>(compact);
    O* result = static_cast<O*>(dw);
    const bool aligned = is_whole_multiple(result, transposed ? rows : features) &&
        (!transposed || is_whole_multiple(source, rows));
    const SumArguments beside = sum_arguments<T>(sums, rows);
    launch("scatter_kept", kernel, {blocks + beside.blocks}, kColumnThreads,
           beside.blocks ? kSumBytes<T> : kSharedBytes, stream, arguments, beside, source, result, scale, aligned);
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
