// How a weight [out, in] lies in memory: as [out, in], or as [in, out], the transpose of a Conv1D weight. Both are
// mixed and differentiated in place, without a copy; any other layout is made contiguous first.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "draw.h"

namespace mixout::cpu {

struct WeightLayout {
  bool transposed;
  int64_t out_features, in_features;

  explicit WeightLayout(const Tensor& weight)
      : transposed(!weight.is_contiguous() && weight.t().is_contiguous()),
        out_features(weight.size(0)),
        in_features(weight.size(1)) {}

  Tensor memory(const Tensor& weight) const { return transposed ? weight.t().contiguous() : weight.contiguous(); }
  Tensor logical(const Tensor& memory) const { return transposed ? memory.t() : memory; }
  Tensor empty(const Tensor& like, at::ScalarType dtype) const {
    const auto options = like.options().dtype(dtype);
    return transposed ? at::empty({in_features, out_features}, options)
                      : at::empty({out_features, in_features}, options);
  }
  // The decisions of a draw over this memory.
  Layout of(const Draw& draw) const {
    const Strides decisions = draw.decisions();
    return transposed ? Layout{in_features, out_features, 1, decisions.transposed()}
                      : Layout{out_features, in_features, 1, decisions};
  }
};

// A weight and its target as they lie in the weight's memory.
struct Operands {
  WeightLayout layout;
  Tensor weight;
  std::optional<Tensor> target;

  Operands(const Tensor& w, const std::optional<Tensor>& u)
      : layout(w), weight(layout.memory(w)), target(u ? std::optional<Tensor>(layout.memory(*u)) : std::nullopt) {}
};

}  // namespace mixout::cpu
