// The records of mixout_kernels/draws.py and backends/contract.py, as the kernels read them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include "../contract.h"
#include "../mix.h"

namespace mixout::cpu {

using at::Tensor;

// Contiguous memory as a matrix, and the decision of each element: element (r, c) has that of (r, c / inner) in
// `decisions`, so a run of `inner` columns shares one.
struct Layout {
  int64_t rows, columns, inner;
  Strides decisions;

  Layout from(int64_t offset) const { return {rows, columns, inner, {offset, decisions.row, decisions.column}}; }
};

struct Draw {
  uint64_t seed;
  double p;
  c10::SmallVector<int64_t, 4> strides;
  int64_t offset;

  bool operator==(const Draw& other) const {
    return seed == other.seed && p == other.p && strides == other.strides && offset == other.offset;
  }

  uint32_t threshold() const {
    TORCH_CHECK(p < 1, "mixout_kernels: a kernel mixes with p below 1, got p = ", p);
    return static_cast<uint32_t>(keep_threshold(p));
  }
  double scale() const { return 1 / (1 - p); }

  // Of a matrix.
  Strides decisions() const {
    TORCH_CHECK(
        strides.size() == 2, "mixout_kernels: a weight of 2 dimensions needs a draw of 2 strides, got ",
        strides.size());
    return {offset, strides[0], strides[1]};
  }
  // One decision for each column: the gradient of the weight is then a dense product of the kept columns alone.
  bool by_column() const { return strides.size() == 2 && strides[0] == 0 && strides[1] == 1; }
};

// A seed on the host is read at once.
inline void read_seed(const Tensor& seed, Draw& draw) {
  draw.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
}

using MixedWeight = mixout::MixedWeight<Draw>;
using WeightGradient = mixout::WeightGradient<Draw>;

}  // namespace mixout::cpu
