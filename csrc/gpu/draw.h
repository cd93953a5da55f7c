// The records of mixout_kernels/draws.py and backends/contract.py for kernels that read the seed on the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "../contract.h"

namespace mixout::gpu {

using at::Tensor;

struct Draw {
  Tensor seed;
  double p;
  c10::SmallVector<int64_t, 4> strides;
  int64_t offset;

  double scale() const { return 1 / (1 - p); }
  // One decision for each column: the gradient of the weight is then a dense product of the kept columns alone.
  bool by_column() const { return strides.size() == 2 && strides[0] == 0 && strides[1] == 1; }
};

// A seed on a device is read by the kernels.
inline void read_seed(const Tensor& seed, Draw& draw) { draw.seed = seed; }

using MixedWeight = mixout::MixedWeight<Draw>;
using WeightGradient = mixout::WeightGradient<Draw>;

}  // namespace mixout::gpu
