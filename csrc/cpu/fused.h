// The products of the layer by our own GEMMs, in float32 (product.cpp), bfloat16 (bf16_product.cpp) or float16
// (f16_product.cpp) as their left-hand side is: Phi is mixed while it is packed and never lies in memory.
#pragma once

#include <optional>

#include "columns.h"
#include "draw.h"

namespace mixout::cpu {

// x Phi^T + b for x [rows, in], or for x [rows, kept] where `only` is what of Phi is not zero. y has the dtype `result`,
// which is b's: float32, or that of x.
Tensor fused_forward(
    const Tensor& x, const MixedWeight& phi, const std::optional<Columns>& only, const std::optional<Tensor>& bias,
    at::ScalarType result);

// g Phi, [rows, in] or [rows, kept].
Tensor fused_input_gradient(
    const Tensor& g, const MixedWeight& phi, const std::optional<Columns>& only, at::ScalarType result);

// dw in the layout and dtype of `weight`: scale * (g^T x) in the kept columns, of which `kept_input` is x, zero in the
// others.
Tensor fused_kept_gradient(
    const Tensor& g, const Tensor& kept_input, const Columns& columns, const Tensor& weight, double scale);

// g^T x in the layout and dtype of `weight`, in its memory.
Tensor fused_dense_gradient(const Tensor& g, const Tensor& x, const Tensor& weight);

}  // namespace mixout::cpu
