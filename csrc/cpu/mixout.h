// Tensor-level operations of the CPU backend, as mixout_kernels/backends/contract.py describes them. Arguments were
// checked in functional.py.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "draw.h"

namespace mixout::cpu {

// In these two `layout` has the strides of `draw`, which has the offset itself.

// The decisions over memory that lies as `layout` says, a bool for each element in that order.
Tensor keep_mask(const Draw& draw, const Layout& layout);

// where(keep, u + (w - u) * factor, u), for a weight of any shape whose contiguous memory is `layout`.
Tensor mixout(
    const Tensor& weight, const std::optional<Tensor>& target, const Draw& draw, const Layout& layout, double factor);

// outs[k] = Phi of weights[k] by draws[k]; outs in their weights' memory layout.
void mixout_list(
    const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& targets, const std::vector<Draw>& draws);

// y [..., out] and x[:, kept]. `fused` (where the dtype has a product of ours here): Phi is mixed while it is packed for the
// product, and never lies in memory whole. `may_round`: that of float32 rounds its operands to bfloat16 while torch's switch
// says so (precision.h), as the library does on a CPU with AMX; the sums and results are float32.
std::tuple<Tensor, Tensor> mix_linear(
    const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias, const WeightGradient& gradient,
    bool fused, bool may_round);

// dx, dw, db. What `needs` does not ask for comes back empty.
std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
    std::tuple<bool, bool, bool> needs, bool fused, bool may_round);

}  // namespace mixout::cpu
