// What csrc/cuda offers: launches over raw device addresses, without a torch header. Arguments were checked in Python
// (mixout_kernels/backends/cuda.py), p is below 1, memory is contiguous, and `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

namespace mixout::cuda {

enum class Type : int { float32, bfloat16, float16 };

// A Bernoulli(1 - p) mask: keep(i) = word(*seed, i) >= threshold. The seed is read on the device.
struct Mask {
  const int64_t* seed;
  uint32_t threshold;
};

// Which index of the mask decides the element in row r and column c of a [rows, columns] memory matrix.
enum class MaskAxis : uint8_t {
  column,           // c / inner: a neuron mask, memory [out, in] or [out, in, inner...]
  row,              // r: a neuron mask, memory [in, out]
  flat,             // r * columns + c, for any number of columns: a weight mask
  flat_transposed,  // c * rows + r: a weight mask, memory [in, out]
};

struct MixTensor {
  const void* w;
  const void* u;  // nullptr is zero
  void* out;      // may be w
  const int64_t* seed;
  int64_t numel, columns;
  uint32_t inner;
  MaskAxis axis;
};

// out = keep ? u + (w - u) * scale : u for `count` tensors of the same types, in one launch for every 500.
void mix_tensors(
    const MixTensor* tensors, int count, Type w, Type u, Type out, uint32_t threshold, float scale, void* stream);

// out[i] = keep(i), i < n.
void keep_mask(Mask mask, bool* out, int64_t n, void* stream);

// compact[r, k] = x[r, j], j the k-th kept feature; columns past the kept ones are zero, features past `capacity` are
// left out.
void gather_kept(
    Mask mask, const void* x, void* compact, Type type, int64_t rows, int64_t features, int64_t capacity, void* stream);

// dw[r, j] = scale * compact[r, k] where j is the k-th kept feature and k < capacity, zero elsewhere. `transposed`:
// the same for dw [features, rows] and compact [capacity, rows].
void scatter_kept(
    Mask mask, const void* compact, void* dw, Type compact_type, Type dw_type, float scale, int64_t rows,
    int64_t features, int64_t capacity, bool transposed, void* stream);

// out[m, a] = sum_c Phi[a, c] x[m, c] + bias[a], Phi mixed on the fly from w and u. The forward product contracts over
// the input features; dx contracts over the output features, with w seen as its transpose.
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
  bool features_are_outputs;  // dx: the input features are the outputs of this product
  bool per_weight;
};

// Several blocks share the contraction of an output tile when there are fewer tiles than multiprocessors.
struct ProductPlan {
  int64_t row_tiles, output_tiles, splits;
  int64_t partial_floats, arrivals;  // the workspace: none if splits == 1
};
ProductPlan plan_product(int64_t rows, int64_t outputs, int64_t contraction, Type w, Type x, int multiprocessors);

// `partial` has partial_floats entries. `arrivals` are zero before and after; nothing else may use them meanwhile.
void mix_product(
    const Product& product, const ProductPlan& plan, Type w, Type u, Type x, float* partial, uint32_t* arrivals,
    void* stream);

}  // namespace mixout::cuda
