// The linear layer as autograd records it (csrc/autograd.h), by the kernels of this folder.
#pragma once

#include <optional>
#include <tuple>

#include "draw.h"

namespace mixout::cpu {

// y and x[:, kept], with the derivatives of x, w and b. `kept_input`: x[:, kept] where a sibling has gathered it.
std::tuple<Tensor, Tensor> recorded_linear(
    const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& kept_input, const WeightGradient& gradient, bool fused, bool may_round);

}  // namespace mixout::cpu
