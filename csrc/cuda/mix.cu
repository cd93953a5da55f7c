// out = keep ? u + (w - u) * scale : u over any number of tensors: bound by memory, so every access is 16 bytes wide
// where addresses allow.
#include <algorithm>

#include "keep_bits.h"
#include "kernels.h"
#include "launch.h"
#include "types.h"

namespace mixout::cuda {

namespace {

constexpr int kMixThreads = 256;
// A thread owns four rows of eight columns: a vector of the widest access per row, and whole Philox calls whether
// neighbouring mask indices run along the row or down the column.
constexpr int kThreadRows = 4, kThreadColumns = 8;
constexpr int kTileRows = kMixThreads / kWarpSize * kThreadRows, kTileColumns = kWarpSize * kThreadColumns;

struct Entry {
  MixTensor tensor;
  uint32_t first_tile;
  bool aligned;
};

// Tables travel as kernel parameters, at most 32764 bytes: a CUDA graph then holds them by value, and nothing is
// copied first.
constexpr int kMaxTensors = 500;

template <int kCapacity>
struct Table {
  int32_t count;
  Entry entry[kCapacity];
};
static_assert(sizeof(Table<kMaxTensors>) + 16 <= 32764, "a kernel's parameters are limited");

template <int kCapacity>
MIXOUT_DEVICE const Entry& find(const Table<kCapacity>& table, uint32_t tile) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entry[middle].first_tile <= tile) low = middle;
    else high = middle;
  }
  return table.entry[low];
}

// Bit 8 r + k decides the element (row + r, column + k).
MIXOUT_DEVICE uint32_t
tile_bits(const MixTensor& tensor, int64_t row, int64_t column, int64_t rows, uint32_t threshold) {
  const uint64_t seed = seed_value(tensor.seed);
  uint32_t bits = 0;
  switch (tensor.axis) {
    case MaskAxis::column:
      if (tensor.inner == 1) {
        bits = keep_bits<kThreadColumns>(seed, column, threshold);
      } else {
#pragma unroll 1
        for (int k = 0; k < kThreadColumns; ++k)
          bits |= static_cast<uint32_t>(mask_word(seed, (column + k) / tensor.inner) >= threshold) << k;
      }
      return bits * 0x01010101u;
    case MaskAxis::row: {
      const uint32_t keep = keep_bits<kThreadRows>(seed, row, threshold);
      for (int r = 0; r < kThreadRows; ++r) bits |= (keep >> r & 1) * 0xFFu << 8 * r;
      return bits;
    }
    case MaskAxis::flat:
#pragma unroll 1
      for (int r = 0; r < kThreadRows; ++r)
        bits |= keep_bits<kThreadColumns>(seed, (row + r) * tensor.columns + column, threshold) << 8 * r;
      return bits;
    default:
#pragma unroll 2
      for (int k = 0; k < kThreadColumns; ++k) {
        const uint32_t keep = keep_bits<kThreadRows>(seed, (column + k) * rows + row, threshold);
        for (int r = 0; r < kThreadRows; ++r) bits |= (keep >> r & 1) << (8 * r + k);
      }
      return bits;
  }
}

template <typename T>
MIXOUT_DEVICE void load(const T* from, int count, bool vector, float (&to)[kThreadColumns]) {
  if (vector) {
    constexpr int kPerVector = sizeof(Vector128) / sizeof(T);
#pragma unroll
    for (int v = 0; v < kThreadColumns / kPerVector; ++v) {
      const Vector128 raw = reinterpret_cast<const Vector128*>(from)[v];
      unpack_vector<T>(raw, to + v * kPerVector);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kThreadColumns; ++k)
      if (k < count) to[k] = to_float(from[k]);
  }
}

template <typename T>
MIXOUT_DEVICE void store(T* to, int count, bool vector, const float (&from)[kThreadColumns]) {
  if (vector) {
    constexpr int kPerVector = sizeof(Vector128) / sizeof(T);
#pragma unroll
    for (int v = 0; v < kThreadColumns / kPerVector; ++v)
      reinterpret_cast<Vector128*>(to)[v] = pack_vector<T>(from + v * kPerVector);
  } else {
#pragma unroll
    for (int k = 0; k < kThreadColumns; ++k)
      if (k < count) to[k] = from_float<T>(from[k]);
  }
}

template <typename W, typename U, typename O, int kCapacity>
MIXOUT_KERNEL(kMixThreads, 2)
mix_kernel(MIXOUT_PARAMETER Table<kCapacity> table, uint32_t threshold, float scale) {
  const Entry& entry = find(table, static_cast<uint32_t>(block_x()));
  const MixTensor& tensor = entry.tensor;
  const int64_t rows = (tensor.numel + tensor.columns - 1) / tensor.columns;
  const uint32_t tile = static_cast<uint32_t>(block_x()) - entry.first_tile;
  const uint32_t column_tiles = static_cast<uint32_t>((tensor.columns + kTileColumns - 1) / kTileColumns);
  const int64_t row = static_cast<int64_t>(tile / column_tiles) * kTileRows + thread_index() / kWarpSize * kThreadRows;
  const int64_t column =
      static_cast<int64_t>(tile % column_tiles) * kTileColumns + thread_index() % kWarpSize * kThreadColumns;
  if (row >= rows || column >= tensor.columns) return;

  const W* w = static_cast<const W*>(tensor.w);
  const U* u = static_cast<const U*>(tensor.u);
  float weight[kThreadRows][kThreadColumns], target[kThreadRows][kThreadColumns];
  int count[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t i = (row + r) * tensor.columns + column;
    const int64_t left = min_of(tensor.columns - column, tensor.numel - i);
    count[r] = left < 0 ? 0 : static_cast<int>(min_of<int64_t>(left, kThreadColumns));
    const bool vector = entry.aligned && count[r] == kThreadColumns;
#pragma unroll
    for (int k = 0; k < kThreadColumns; ++k) target[r][k] = 0;
    load(w + i, count[r], vector, weight[r]);
    if (u != nullptr) load(u + i, count[r], vector, target[r]);
  }
  const uint32_t bits = tile_bits(tensor, row, column, rows, threshold);
  O* out = static_cast<O*>(tensor.out);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t i = (row + r) * tensor.columns + column;
    float mixed[kThreadColumns];
#pragma unroll
    for (int k = 0; k < kThreadColumns; ++k)
      mixed[k] = mix((bits >> (8 * r + k) & 1) != 0, weight[r][k], target[r][k], scale);
    store(out + i, count[r], entry.aligned && count[r] == kThreadColumns, mixed);
  }
}

template <typename W, typename U, typename O, int kCapacity>
void launch_mix(const Table<kCapacity>& table, uint32_t tiles, uint32_t threshold, float scale, void* stream) {
  launch("mix", mix_kernel<W, U, O, kCapacity>, {tiles}, kMixThreads, 0, stream, table, threshold, scale);
}

template <int kCapacity>
void mix_table(
    const MixTensor* tensors, int count, Type w, Type u, Type out, uint32_t threshold, float scale, void* stream) {
  Table<kCapacity> table{};
  uint32_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    MixTensor tensor = tensors[i];
    if (tensor.numel == 0) continue;
    if (tensor.axis == MaskAxis::flat) tensor.columns = kTileColumns;  // any width gives the same mask
    const auto addresses = reinterpret_cast<uintptr_t>(tensor.w) | reinterpret_cast<uintptr_t>(tensor.u) |
        reinterpret_cast<uintptr_t>(tensor.out);
    Entry& entry = table.entry[table.count++];
    entry.tensor = tensor;
    entry.first_tile = tiles;
    entry.aligned = addresses % sizeof(Vector128) == 0 && tensor.columns % kThreadColumns == 0;
    const int64_t rows = divide_up(tensor.numel, tensor.columns);
    tiles += static_cast<uint32_t>(divide_up(rows, kTileRows) * divide_up(tensor.columns, kTileColumns));
  }
  if (tiles == 0) return;
  dispatch_mix(w, u, out, [&](auto w_type, auto u_type, auto out_type) {
    launch_mix<typename decltype(w_type)::type, typename decltype(u_type)::type, typename decltype(out_type)::type>(
        table, tiles, threshold, scale, stream);
  });
}

}  // namespace

void mix_tensors(
    const MixTensor* tensors, int count, Type w, Type u, Type out, uint32_t threshold, float scale, void* stream) {
  if (count == 1) return mix_table<1>(tensors, 1, w, u, out, threshold, scale, stream);
  for (int i = 0; i < count; i += kMaxTensors)
    mix_table<kMaxTensors>(
        tensors + i, std::min(kMaxTensors, count - i), w, u, out, threshold, scale, stream);
}

}  // namespace mixout::cuda
