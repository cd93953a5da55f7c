// The linear layer by the kernels of csrc/cuda, without Python: what mixout_kernels/backends/gpu_linear.py makes of its
// primitives, operation by operation, and so its reference. This is host code with torch's types and no CUDA header; it
// reaches the launches through a table (cuda/launchers.h), so that it also runs on the kernels' emulation.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "../cuda/launchers.h"
#include "draw.h"

namespace mixout::gpu {

// Whom to ask for a launch, and where. A backward that autograd runs has the stream of its forward as the current one
// (Engine::evaluate_function), so the stream that a node keeps is the one that torch's own kernels go to.
struct Launch {
  const cuda::Launchers* launchers;
  void* stream;
  bool fused;  // where the weight is to be mixed
};

// y [..., out], which is no view, and x[:, kept] [rows, width]. The bias is contiguous and has the input's dtype.
std::tuple<Tensor, Tensor> mix_linear(
    const Launch& launch, const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const WeightGradient& gradient);

// dx, dw, db, the last one in the dtype of the bias; what `needs` does not ask for is undefined.
std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Launch& launch, const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi,
    const WeightGradient& gradient, const std::array<bool, 3>& needs, at::ScalarType bias);

}  // namespace mixout::gpu
