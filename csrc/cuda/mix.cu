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
  bool aligned;  // rows of whole vectors, at multiples of 16 bytes
};

// Tables travel as kernel parameters, at most 32764 bytes: a CUDA graph then holds them by value, and nothing is
// copied first. 340 entries of 96 bytes fit, with a mask, a p and a factor for each tensor: more than twice the layers
// of BERT-large. A larger model costs one more launch for every 340.
constexpr int kMaxTensors = 340;

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

// Bit 8 r + k decides the element (row + r, column + k). A stride of 0 leaves one row, or one column, to work out; runs
// of indices along a row or down a column share their Philox calls.
MIXOUT_DEVICE uint32_t tile_bits(const Mask& mask, uint64_t seed, int64_t row, int64_t column) {
  const Strides& strides = mask.strides;
  const int rows = strides.row == 0 ? 1 : kThreadRows, columns = strides.column == 0 ? 1 : kThreadColumns;
  uint32_t bits = 0;
  if (mask.inner == 1 && strides.column == 1) {
#pragma unroll 1
    for (int r = 0; r < rows; ++r)
      bits |= keep_bits<kThreadColumns>(seed, strides.index(row + r, column), mask.threshold) << 8 * r;
  } else if (mask.inner == 1 && strides.row == 1) {
#pragma unroll 1
    for (int k = 0; k < columns; ++k) {
      const uint32_t keep = keep_bits<kThreadRows>(seed, strides.index(row, column + k), mask.threshold);
      for (int r = 0; r < kThreadRows; ++r) bits |= (keep >> r & 1) << (8 * r + k);
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < columns; ++k) {
      const int64_t decision = (column + k) / mask.inner;
#pragma unroll 1
      for (int r = 0; r < rows; ++r)
        bits |= static_cast<uint32_t>(mask_word(seed, strides.index(row + r, decision)) >= mask.threshold)
            << (8 * r + k);
    }
  }
  if (rows == 1) bits *= 0x01010101u;
  if (columns == 1) bits *= 0xFFu;
  return bits;
}

// The columns of one row that a thread owns, as they lie in memory.
template <typename T>
struct Row {
  static constexpr int kVectors = kThreadColumns * sizeof(T) / sizeof(Vector128);
  static constexpr int kPerVector = kThreadColumns / kVectors;
  Vector128 vector[kVectors];
};

template <typename T>
MIXOUT_DEVICE void load(const T* from, int64_t columns, Row<T> (&to)[kThreadRows]) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
    for (int v = 0; v < Row<T>::kVectors; ++v)
      to[r].vector[v] = reinterpret_cast<const Vector128*>(from + r * columns)[v];
}

template <typename T>
MIXOUT_DEVICE void unpack(const Row<T>& row, float (&value)[kThreadColumns]) {
#pragma unroll
  for (int v = 0; v < Row<T>::kVectors; ++v) unpack_vector<T>(row.vector[v], value + v * Row<T>::kPerVector);
}

template <typename T>
MIXOUT_DEVICE void store(T* to, const float (&value)[kThreadColumns]) {
#pragma unroll
  for (int v = 0; v < Row<T>::kVectors; ++v)
    store_vector(reinterpret_cast<Vector128*>(to) + v, pack_vector<T>(value + v * Row<T>::kPerVector));
}

template <typename W, typename U, typename O>
MIXOUT_DEVICE void mix_rows(
    const Row<W> (&w)[kThreadRows], const Row<U> (&u)[kThreadRows], O* out, int64_t columns, uint32_t bits,
    float factor) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    float weight[kThreadColumns], target[kThreadColumns], mixed[kThreadColumns];
    unpack(w[r], weight);
    unpack(u[r], target);
#pragma unroll
    for (int k = 0; k < kThreadColumns; ++k)
      mixed[k] = mix((bits >> (8 * r + k) & 1) != 0, weight[k], target[k], factor);
    store(out + r * columns, mixed);
  }
}

template <typename T>
MIXOUT_DEVICE void load_elements(const T* from, int64_t count, float (&to)[kThreadColumns]) {
#pragma unroll
  for (int k = 0; k < kThreadColumns; ++k)
    if (k < count) to[k] = to_float(from[k]);
}

// Where a row or the tensor ends within the thread's elements, or an address is no multiple of 16. `columns_left` and
// `left` count what the row and the tensor have from the thread's first element on.
template <typename W, typename U, typename O>
MIXOUT_DEVICE void mix_elements(
    const W* w, const U* u, O* out, int64_t columns, int64_t columns_left, int64_t left, uint32_t bits, float factor) {
#pragma unroll 1
  for (int r = 0; r < kThreadRows && left > 0; ++r) {
    const int64_t count = min_of(columns_left, left);
    float weight[kThreadColumns], target[kThreadColumns] = {};
    load_elements(w + r * columns, count, weight);
    if (u != nullptr) load_elements(u + r * columns, count, target);
#pragma unroll
    for (int k = 0; k < kThreadColumns; ++k)
      if (k < count)
        out[r * columns + k] = from_float<O>(mix((bits >> (8 * r + k) & 1) != 0, weight[k], target[k], factor));
    left -= columns;
  }
}

template <typename W, typename U, typename O, int kCapacity>
MIXOUT_KERNEL(kMixThreads, 2)
mix_kernel(MIXOUT_PARAMETER Table<kCapacity> table) {
  const Entry& entry = find(table, static_cast<uint32_t>(block_x()));
  const MixTensor& tensor = entry.tensor;
  const uint32_t tile = static_cast<uint32_t>(block_x()) - entry.first_tile;
  const uint32_t column_tiles = static_cast<uint32_t>((tensor.columns + kTileColumns - 1) / kTileColumns);
  const int64_t row = static_cast<int64_t>(tile / column_tiles) * kTileRows + thread_index() / kWarpSize * kThreadRows;
  const int64_t column =
      static_cast<int64_t>(tile % column_tiles) * kTileColumns + thread_index() % kWarpSize * kThreadColumns;
  const int64_t columns = tensor.columns, first = row * columns + column, left = tensor.numel - first;
  if (column >= columns || left <= 0) return;

  const W* w = static_cast<const W*>(tensor.w) + first;
  const U* u = tensor.u == nullptr ? nullptr : static_cast<const U*>(tensor.u) + first;
  O* out = static_cast<O*>(tensor.out) + first;
  const bool whole = entry.aligned && left >= (kThreadRows - 1) * columns + kThreadColumns;

  // The mask is computed while w and u are on their way: nothing may wait for them before that is done. Two plainer
  // ways would (nvcc 13.0, seen by `make codegen`). Loads that are used in another basic block share one scoreboard:
  // after a plain load the first use of the seed waits for w and u too (sm_80, sm_90a, sm_100). And where the zeros of
  // an absent target stand beside the loads, ptxas copies the target on arrival (float32 to 16 bits; sm_100, sm_120).
  const uint64_t seed = static_cast<uint64_t>(load_acquire(tensor.mask.seed));
  Row<W> weight[kThreadRows];
  Row<U> target[kThreadRows];
  if (whole) load(w, columns, weight);
  if (whole && u != nullptr) load(u, columns, target);
  const uint32_t bits = tile_bits(tensor.mask, seed, row, column);
  if (!whole) return mix_elements(w, u, out, columns, columns - column, left, bits, tensor.factor);
  if (u == nullptr)
    for (Row<U>& zero : target) zero = {};
  mix_rows(weight, target, out, columns, bits, tensor.factor);
}

template <typename W, typename U, typename O, int kCapacity>
void launch_mix(const Table<kCapacity>& table, uint32_t tiles, void* stream) {
  launch("mix", mix_kernel<W, U, O, kCapacity>, {tiles}, kMixThreads, 0, stream, table);
}

// Where decisions run on from row to row as along a row, any width has the same mask: one of whole tiles, which leaves
// no odd ends but the last.
void choose_width(MixTensor& tensor) {
  Strides& strides = tensor.mask.strides;
  const bool is_one_run = tensor.columns == tensor.numel || strides.row == tensor.columns * strides.column;
  if (!is_one_run || tensor.mask.inner != 1) return;
  tensor.columns = kTileColumns;
  strides.row = kTileColumns * strides.column;
}

template <int kCapacity>
void mix_table(const MixTensor* tensors, int count, Type w, Type u, Type out, void* stream) {
  Table<kCapacity> table{};
  uint32_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    MixTensor tensor = tensors[i];
    if (tensor.numel == 0) continue;
    choose_width(tensor);
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
        table, tiles, stream);
  });
}

}  // namespace

void mix_tensors(const MixTensor* tensors, int count, Type w, Type u, Type out, void* stream) {
  if (count == 1) return mix_table<1>(tensors, 1, w, u, out, stream);
  for (int i = 0; i < count; i += kMaxTensors)
    mix_table<kMaxTensors>(tensors + i, std::min(kMaxTensors, count - i), w, u, out, stream);
}

}  // namespace mixout::cuda
