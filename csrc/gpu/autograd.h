// The linear layer as autograd records it (csrc/autograd.h), by the kernels of csrc/cuda.
#pragma once

#include "linear.h"

namespace mixout::gpu {

// y and x[:, kept], with the derivatives of x, w and b. `kept_input`: x[:, kept] where a sibling has gathered it.
std::tuple<Tensor, Tensor> recorded_linear(
    const Launch& launch, const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& kept_input, const WeightGradient& gradient);

}  // namespace mixout::gpu
