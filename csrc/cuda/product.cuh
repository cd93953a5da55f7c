// out = x Phi^T + bias with Phi mixed inside the tile loop, for few rows of x (16 to 256): w and u are read once from
// memory, Phi is never written.
//
// Why it is bound by reading w and u: 64 x 4096 x 4096 in bfloat16 reads 67 MB of w and u, 15.6 us at 4.3 TB/s, and
// does 2.1 GFLOP, 3 us at 700 TFLOP/s. A multiprocessor then receives 19 bytes a cycle, while for every 8 KB of w and u
// it moves 26 KB through shared memory (62 of 128 bytes a cycle) and issues some 260 instructions in each of its four
// partitions (of 430 cycles): two warps to a partition, 513 instructions a warp for a stage of 32 KB on sm_90a, the mask
// aside (docs/codegen_cuda.md). With addresses worked out anew for every stage, in place of pointers that move on, it
// was 813. To cover the latency of memory, three stages are under way at any time.
//
// The product is computed transposed: Phi is the left operand of mma.sync and goes from shared memory through the mix
// into registers, each element once. A block of eight warps covers kOutputs x kRows results: four warps side by side on
// the outputs, two on halves of each 64-deep stage, added up in shared memory at the end. One template serves four
// cases: forward and dx, w in memory as [out, in] and as [in, out]; what differs is which index runs along memory
// (kContiguous) and along which one the mask's decisions lie (branches in fill_mask).
#pragma once

#include "keep_bits.h"
#include "kernels.h"
#include "launch.h"
#include "tiles.cuh"

namespace mixout::cuda {

constexpr int kSlices = 2, kSliceWarps = 4, kSliceDepth = kDepth / kSlices;
// The contraction a block can have: the mask bits of that many columns lie in shared memory.
constexpr int64_t kMaxChunk = 8192;

template <typename W>
constexpr int kOutputs = 256 / sizeof(W);  // a stage of w is 16 KB in every type

template <typename W, typename U, typename T, bool kContiguous, int kRows>
struct ProductShape {
  using Input = T;
  using WTile = WeightTile<W, kOutputs<W>, kContiguous>;
  using UTile = WeightTile<U, kOutputs<W>, kContiguous>;
  using XTile = Tile<T, kRows, kDepth>;
  static constexpr int kStageBytes = WTile::kBytes + UTile::kBytes + XTile::kBytes;
  static constexpr int kMaskBytes = 2 * kOutputs<W> * kSlices * 4;  // two buffers of a word per output and slice
  static constexpr int kFixedBytes = kMaskBytes + kMaxChunk / 8;
  static constexpr int kOutputTiles = kOutputs<W> / (16 * kSliceWarps), kRowTiles = kRows / 8;
  static constexpr int kOwned = kRowTiles / kSlices;  // row tiles that a slice finishes
  static constexpr int kExchangeBytes = kProductThreads * kOutputTiles * kOwned * 16;
  static_assert(kExchangeBytes <= 2 * kStageBytes, "the exchange reuses the stages");
};

struct ProductArguments {
  Product product;
  float4* partial;
  uint32_t* arrivals;
  int64_t chunk;  // contraction of one block, a multiple of kDepth
  int stages;
  bool aligned;
};

// Whether one decision serves a whole column of Phi (a contraction index), or a whole row (an output).
MIXOUT_DEVICE bool is_by_column(const Mask& mask) { return mask.strides.row == 0; }
MIXOUT_DEVICE bool is_shared(const Mask& mask) { return mask.strides.row == 0 || mask.strides.column == 0; }

// Shared decisions as bits, for the whole chunk: by column one for each depth, else one for each output.
template <int kOut>
MIXOUT_DEVICE void fill_shared_bits(
    unsigned char* bits, const Mask& mask, uint64_t seed, int64_t output, int64_t begin, int steps) {
  const bool by_column = is_by_column(mask);
  const int64_t stride = by_column ? mask.strides.column : mask.strides.row;
  const uint64_t first = by_column ? mask.strides.index(0, begin) : mask.strides.index(output, 0);
  const int bytes = by_column ? steps * kDepth / 8 : kOut / 8;
  for (int i = thread_index(); i < bytes; i += kProductThreads)
    bits[i] = static_cast<unsigned char>(keep_bits<8>(seed, first + i * 8 * stride, stride, mask.threshold));
}

// The mask of one stage, as bits: word [output][slice], bit d for depth d of the slice.
template <int kOut>
MIXOUT_DEVICE void fill_mask(
    unsigned char* words, const unsigned char* shared_bits, const Mask& mask, uint64_t seed, int64_t output,
    int64_t depth, int64_t chunk_begin) {
  constexpr int kOctets = kDepth / 8;
  const Strides& strides = mask.strides;
  if (is_shared(mask)) {
    for (int i = thread_index(); i < kOut * kSlices; i += kProductThreads) {
      const int out = i / kSlices;
      reinterpret_cast<uint32_t*>(words)[i] = is_by_column(mask)
          ? reinterpret_cast<const uint32_t*>(shared_bits)[(depth - chunk_begin) / 32 + i % kSlices]
          : 0u - (shared_bits[out / 8] >> out % 8 & 1u);
    }
  } else if (strides.row != 1) {
#pragma unroll 1
    for (int i = thread_index(); i < kOut * kOctets; i += kProductThreads)
      words[i] = static_cast<unsigned char>(keep_bits<8>(
          seed, strides.index(output + i / kOctets, depth + i % kOctets * 8), strides.column, mask.threshold));
  } else {
    // Indices run along the outputs: four outputs share a Philox call, for each of eight depths.
#pragma unroll 1
    for (int i = thread_index(); i < kOut / 4 * kOctets; i += kProductThreads) {
      const int out = i / kOctets * 4, octet = i % kOctets;
      uint32_t octets = 0;
#pragma unroll 2
      for (int d = 0; d < 8; ++d) {
        const uint32_t keep =
            keep_bits<4>(seed, strides.index(output + out, depth + octet * 8 + d), mask.threshold);
        for (int k = 0; k < 4; ++k) octets |= (keep >> k & 1u) << (8 * k + d);
      }
      for (int k = 0; k < 4; ++k) words[(out + k) * kOctets + octet] = static_cast<unsigned char>(octets >> 8 * k);
    }
  }
}

// One stage on the tensor cores: Phi is mixed in the registers that mma.sync takes it from.
template <typename Shape>
MIXOUT_DEVICE void multiply_half(
    float (&sum)[Shape::kOutputTiles][Shape::kRowTiles][4], const unsigned char* w_tile, const unsigned char* u_tile,
    const unsigned char* x_tile, const uint32_t* words, const Product& p) {
  using T = typename Shape::Input;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int slice = warp / kSliceWarps, first_tile = warp % kSliceWarps * Shape::kOutputTiles;
#pragma unroll
  for (int half = 0; half < kSliceDepth / 16; ++half) {
    const int depth = slice * kSliceDepth + half * 16;
    uint32_t x_matrix[Shape::kRowTiles / 2][4];
#pragma unroll
    for (int j = 0; j < Shape::kRowTiles / 2; ++j)
      load_matrices<false>(
          x_matrix[j], Shape::XTile::at(x_tile, j * 16 + lane / 16 * 8 + lane % 8, depth + lane / 8 % 2 * 8));
#pragma unroll
    for (int i = 0; i < Shape::kOutputTiles; ++i) {
      const int out = (first_tile + i) * 16;
      Pair weight[4], target[4] = {};
      Shape::WTile::fragment(w_tile, out, depth, weight);
      if (p.u != nullptr) Shape::UTile::fragment(u_tile, out, depth, target);
      uint32_t phi[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t word = words[(out + lane / 4 + k % 2 * 8) * kSlices + slice];
        const uint32_t keep = word >> (half * 16 + lane % 4 * 2 + k / 2 * 8);
        phi[k] = pack<T>(
            mix((keep & 1) != 0, weight[k].low, target[k].low, p.scale),
            mix((keep & 2) != 0, weight[k].high, target[k].high, p.scale));
      }
#pragma unroll
      for (int j = 0; j < Shape::kRowTiles; ++j)
        multiply_add<T>(sum[i][j], phi, x_matrix[j / 2][j % 2 * 2], x_matrix[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// One stage in float32, which tensor cores would round: the sums are spread over the threads as mma.sync has them, and
// the four threads that share an output mix its Phi each for itself.
template <typename Shape>
MIXOUT_DEVICE void multiply_float(
    float (&sum)[Shape::kOutputTiles][Shape::kRowTiles][4], const unsigned char* w_tile, const unsigned char* u_tile,
    const unsigned char* x_tile, const uint32_t* words, const Product& p) {
  static_assert(Shape::kOutputTiles == 1, "a float32 weight");
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int slice = warp / kSliceWarps;
#pragma unroll 2
  for (int d = 0; d < kSliceDepth; d += 4) {
    const int depth = slice * kSliceDepth + d;
    float phi[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int out = warp % kSliceWarps * 16 + lane / 4 + k * 8;
      float weight[4], target[4] = {};
      Shape::WTile::line(w_tile, out, depth, weight);
      if (p.u != nullptr) Shape::UTile::line(u_tile, out, depth, target);
      const uint32_t keep = words[out * kSlices + slice] >> d;
#pragma unroll
      for (int e = 0; e < 4; ++e) phi[k][e] = mix((keep >> e & 1) != 0, weight[e], target[e], p.scale);
    }
#pragma unroll
    for (int j = 0; j < Shape::kRowTiles; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[4];
        Shape::XTile::load_four(x_tile, j * 8 + lane % 4 * 2 + r, depth, x);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[0][j][k * 2 + r] = fused_multiply_add(phi[k][e], x[e], sum[0][j][k * 2 + r]);
      }
  }
}

template <typename W, typename U, typename T, bool kContiguous, int kRows>
MIXOUT_KERNEL(kProductThreads, 1)
mix_product_kernel(MIXOUT_PARAMETER ProductArguments a) {
  using Shape = ProductShape<W, U, T, kContiguous, kRows>;
  constexpr int kOut = kOutputs<W>;
  constexpr int kOutputTiles = Shape::kOutputTiles, kOwned = Shape::kOwned;
  const Product& p = a.product;
  const int thread = thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int slice = warp / kSliceWarps, slice_warp = warp % kSliceWarps;
  const int64_t row = block_x() * kRows, output = block_y() * kOut;
  const int64_t begin = block_z() * a.chunk, end = min_of(begin + a.chunk, p.contraction);
  const int steps = static_cast<int>((end - begin + kDepth - 1) / kDepth);

  unsigned char* stages = shared_memory();
  unsigned char* mask_words = stages + a.stages * Shape::kStageBytes;
  unsigned char* shared_bits = mask_words + Shape::kMaskBytes;

  // Stages are filled, and read, one after the other in a ring.
  unsigned char* const stages_end = stages + a.stages * Shape::kStageBytes;
  const auto after = [&](unsigned char* stage) {
    return stage + Shape::kStageBytes == stages_end ? stages : stage + Shape::kStageBytes;
  };
  unsigned char* filled = stages;
  const int64_t memory_row = kContiguous ? output : begin, memory_column = kContiguous ? begin : output;
  const int64_t memory_rows = kContiguous ? p.outputs : p.contraction;
  const int64_t memory_columns = kContiguous ? p.contraction : p.outputs;
  typename Shape::WTile::Source w_source(
      static_cast<const W*>(p.w), memory_row, memory_column, memory_rows, memory_columns);
  typename Shape::UTile::Source u_source(
      static_cast<const U*>(p.u), memory_row, memory_column, memory_rows, memory_columns);
  typename Shape::XTile::Source x_source(static_cast<const T*>(p.x), row, begin, p.rows, p.contraction);
  const auto fill_stage = [&] {
    w_source.load(filled, a.aligned);
    if (p.u != nullptr) u_source.load(filled + Shape::WTile::kBytes, a.aligned);
    x_source.load(filled + Shape::WTile::kBytes + Shape::UTile::kBytes, a.aligned);
    if constexpr (kContiguous) {
      w_source.move_right(kDepth);
      u_source.move_right(kDepth);
    } else {
      w_source.move_down(kDepth);
      u_source.move_down(kDepth);
    }
    x_source.move_right(kDepth);
    filled = after(filled);
  };

  const uint64_t seed = seed_value(p.mask.seed);
  float sum[kOutputTiles][Shape::kRowTiles][4] = {};
  unsigned char* stage = stages;
  // Steps below zero fill the pipeline. Loads run `stages - 1` steps ahead of the product, the mask one step.
  for (int step = 1 - a.stages; step < steps; ++step) {
    if (step >= 0) {
      copy_async_wait(a.stages - 2);
      synchronize_block();
    }
    if (step + a.stages - 1 < steps) fill_stage();
    copy_async_commit();
    if (step == -1 && is_shared(p.mask)) {
      fill_shared_bits<kOut>(shared_bits, p.mask, seed, output, begin, steps);
      synchronize_block();
    }
    if (step >= -1 && step + 1 < steps)
      fill_mask<kOut>(
          mask_words + (step + 1) % 2 * (Shape::kMaskBytes / 2), shared_bits, p.mask, seed, output,
          begin + static_cast<int64_t>(step + 1) * kDepth, begin);
    if (step < 0) continue;

    const unsigned char *w_tile = stage, *u_tile = w_tile + Shape::WTile::kBytes;
    const unsigned char* x_tile = u_tile + Shape::UTile::kBytes;
    const auto* words = reinterpret_cast<const uint32_t*>(mask_words + step % 2 * (Shape::kMaskBytes / 2));
    if constexpr (sizeof(T) == 2) multiply_half<Shape>(sum, w_tile, u_tile, x_tile, words, p);
    else multiply_float<Shape>(sum, w_tile, u_tile, x_tile, words, p);
    stage = after(stage);
  }

  // Each slice hands the other one the row tiles that it does not finish itself. The stages have been read, and no copy
  // is under way: the last step has waited for the last one.
  synchronize_block();
  auto* exchange = reinterpret_cast<float4*>(stages);
  float4 owned[kOutputTiles][kOwned];
#pragma unroll
  for (int i = 0; i < kOutputTiles; ++i)
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      const float(&low)[4] = sum[i][j];
      const float(&high)[4] = sum[i][j + kOwned];
      const float4 first{low[0], low[1], low[2], low[3]}, second{high[0], high[1], high[2], high[3]};
      owned[i][j] = slice == 0 ? first : second;
      exchange[(i * kOwned + j) * kProductThreads + thread] = slice == 0 ? second : first;
    }
  synchronize_block();
#pragma unroll
  for (int i = 0; i < kOutputTiles; ++i)
#pragma unroll
    for (int j = 0; j < kOwned; ++j)
      add_to(owned[i][j], exchange[(i * kOwned + j) * kProductThreads + (thread ^ kProductThreads / 2)]);

  if (blocks_z() > 1) {
    // The block that arrives last adds up the partial sums, in the order of the splits whoever it is.
    constexpr int kVectors = kOutputTiles * kOwned;
    const int64_t tile = block_y() * blocks_x() + block_x();
    float4* partial = a.partial + tile * blocks_z() * kVectors * kProductThreads + thread;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      store_coherent(partial + (block_z() * kVectors + v) * kProductThreads, owned[v / kOwned][v % kOwned]);
    device_fence();
    synchronize_block();
    auto* is_last = reinterpret_cast<bool*>(mask_words);
    if (thread == 0) *is_last = atomic_add(&a.arrivals[tile], 1) == blocks_z() - 1;
    synchronize_block();
    if (!*is_last) return;
    device_fence();
    if (thread == 0) a.arrivals[tile] = 0;
    float4 total[kOutputTiles][kOwned] = {};
    for (int64_t split = 0; split < blocks_z(); ++split)
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        add_to(total[v / kOwned][v % kOwned],
               split == block_z() ? owned[v / kOwned][v % kOwned]
                                  : load_coherent(partial + (split * kVectors + v) * kProductThreads));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) owned[v / kOwned][v % kOwned] = total[v / kOwned][v % kOwned];
  }

  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
#pragma unroll
  for (int i = 0; i < kOutputTiles; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t o = output + (slice_warp * kOutputTiles + i) * 16 + lane / 4 + k * 8;
      if (o >= p.outputs) continue;
      const float b = bias == nullptr ? 0.0f : to_float(bias[o]);
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        const int64_t r = row + (slice * kOwned + j) * 8 + lane % 4 * 2;
        const float4 v = owned[i][j];
        if (r < p.rows) out[r * p.outputs + o] = from_float<T>((k == 0 ? v.x : v.z) + b);
        if (r + 1 < p.rows) out[(r + 1) * p.outputs + o] = from_float<T>((k == 0 ? v.y : v.w) + b);
      }
    }
}

}  // namespace mixout::cuda
