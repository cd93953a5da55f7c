// The records of mixout_kernels/backends/contract.py, over the Draw of either kind of device.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace mixout {

// The weight [out, in] that a product reads: `operand` where the caller has it, else Phi of w and u by `draw`.
template <typename Draw>
struct MixedWeight {
  at::Tensor weight;
  std::optional<at::Tensor> target, operand;
  Draw draw;
};

// dw = scale * M * (g^T x), M by `draw`; `width` is that of the saved x[:, kept].
template <typename Draw>
struct WeightGradient {
  Draw draw;
  double scale;
  std::optional<int64_t> width;
};

}  // namespace mixout
