// Tensor-level operations of the CPU backend. Arguments were checked in functional.py.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

#include "product.h"

namespace mixout::cpu {

using at::Tensor;

// Which index of the mask decides an element of a tensor that lies in memory as [outer, features, inner].
struct MaskLayout {
  int64_t outer, features, inner;
  bool per_weight;           // false: the feature's index
  bool transposed = false;   // per_weight only: the memory is the transpose of the [inner, features] weight
};

uint64_t seed_value(const Tensor& seed);

// Mixes contiguous memory: out = Phi(w, u), out preallocated, p < 1. `out` may be `w`.
void mix_into(
    const Tensor& out, const Tensor& w, const std::optional<Tensor>& u, uint64_t seed, double p, double scale,
    const MaskLayout& layout);

// The rows of Phi(w, u) in float32 for a matrix that lies as [rows, columns] in contiguous memory, mixed as they are
// read; p < 1.
std::unique_ptr<Rows> mixed_rows(
    const Tensor& w, const std::optional<Tensor>& u, uint64_t seed, double p, const MaskLayout& layout);

// keep(i) for i < n.
Tensor keep_mask(const Tensor& seed, double p, int64_t n);

Tensor mixout(
    const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, double p, double scale,
    bool per_weight);

// outs[k] = Phi of weights[k] by seeds[k]; 2-D weights, outs in their weights' memory layout, p < 1.
void mixout_list(
    const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& targets, const Tensor& seeds, double p, bool per_weight);

// y [..., out] and x[:, kept] [rows, saved_columns]; see backends/__init__.py. `fused` (float32, where
// product_available()): Phi is mixed while it is packed for the product, and never lies in memory whole.
std::tuple<Tensor, Tensor> mix_linear(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target, const std::optional<Tensor>& bias,
    const Tensor& seed, double p, bool per_weight, std::optional<int64_t> saved_columns,
    const std::optional<Tensor>& mixed, bool fused);

// dx, dw, db; `scale` is the factor of a kept entry of dw. What `needs` does not ask for comes back empty.
std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Tensor& grad, const Tensor& saved_input, const Tensor& weight, const std::optional<Tensor>& target,
    const Tensor& seed, double p, double scale, bool per_weight, std::tuple<bool, bool, bool> needs,
    const std::optional<Tensor>& mixed, bool fused);

}  // namespace mixout::cpu
