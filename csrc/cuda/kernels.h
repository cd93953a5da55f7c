// What csrc/cuda offers: launches over raw device addresses, without a torch header. Arguments were checked in Python
// (mixout_kernels/backends/cuda), p is below 1, memory is contiguous, and `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "../mix.h"

namespace mixout::cuda {

enum class Type : int { float32, bfloat16, float16 };

// The decisions for a matrix: keep(r, c) = word(*seed, strides.index(r, c / inner)) >= threshold. Nothing here knows a
// kind of mask; what is fast where some stride is 0 or 1 has a general path beside it. The seed is read on the device.
struct Mask {
  const int64_t* seed;
  Strides strides;
  uint32_t threshold;
  uint32_t inner;  // neighbours in a row that share a decision: the window of a convolution, else 1
};

// A matrix of rows of `columns`, the last one possibly cut short by `numel`, mixed by a mask and a factor of its own.
struct MixTensor {
  const void* w;
  const void* u;  // nullptr is zero
  void* out;      // may be w
  Mask mask;
  int64_t numel, columns;
  float factor;
};

// out = keep ? u + (w - u) * factor : u for `count` tensors of the same types, in one launch for every 340.
void mix_tensors(const MixTensor* tensors, int count, Type w, Type u, Type out, void* stream);

// out[r, c] = keep(r, c) for a contiguous matrix.
void keep_mask(const Mask& mask, bool* out, int64_t rows, int64_t columns, void* stream);

// The masks of these two have a decision for each column j, word(*seed, offset + j): row stride 0, column stride 1.
//
// compact[r, k] = x[r, j], j the k-th kept feature; columns past the kept ones are zero, features past `capacity` are
// left out.
void gather_kept(
    const Mask& mask, const void* x, void* compact, Type type, int64_t rows, int64_t features, int64_t capacity, void* stream);

// sums[c] = sum over r of g[r, c], in float32 and rounded once: the gradient of the bias.
struct ColumnSums {
  const void* g;         // [rows, columns], its rows `stride` elements apart; nullptr: there is nothing to sum
  void* sums;            // [columns], of the type of g or of float32
  Type type;             // of the sums
  int64_t rows, stride;  // the columns are the rows of dw
};

// dw[r, j] = scale * compact[r, k] where j is the k-th kept feature and k < capacity, zero elsewhere. `transposed`:
// the same for dw [features, rows] and compact [capacity, rows]. Blocks beside those of dw take the sums, of a g of
// the type of compact: launches of their own would last longer than reading g, which a GEMM has left in the cache.
void scatter_kept(
    const Mask& mask, const void* compact, void* dw, Type compact_type, Type dw_type, float scale, int64_t rows,
    int64_t features, int64_t capacity, bool transposed, const ColumnSums& sums, void* stream);

// out[m, a] = sum_c Phi[a, c] x[m, c] + bias[a], Phi mixed on the fly from w and u, row a and column c of it decided by
// the mask. The forward product contracts over the input features; dx contracts over the output features, with w and
// the mask seen as their transposes.
struct Product {
  const void* x;     // [rows, contraction]
  const void* w;     // [outputs, contraction] if `contiguous`, else [contraction, outputs]
  const void* u;     // nullptr is zero
  const void* bias;  // [outputs] or nullptr
  void* out;         // [rows, outputs]
  Mask mask;
  float scale;
  int64_t rows, outputs, contraction;
  bool contiguous;
};

// Several blocks share the contraction of an output tile when there are fewer tiles than multiprocessors.
struct ProductPlan {
  int64_t row_tiles, output_tiles, splits;
  int64_t partial_floats, arrivals;  // the workspace: none if splits == 1
};
ProductPlan plan_product(int64_t rows, int64_t outputs, int64_t contraction, Type w, Type x, int multiprocessors);

// Of the current device.
int multiprocessors();

// Zeros for `arrivals`, which the launches of one stream share and which are never given back; nullptr where the caller
// is to bring its own: a captured graph may be replayed on any stream.
uint32_t* kept_arrivals(int64_t count, void* stream);

// `partial` has partial_floats entries. `arrivals` are zero before and after; nothing else may use them meanwhile.
void mix_product(
    const Product& product, const ProductPlan& plan, Type w, Type u, Type x, float* partial, uint32_t* arrivals,
    void* stream);

}  // namespace mixout::cuda
