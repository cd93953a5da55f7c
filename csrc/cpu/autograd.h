// The linear layer as autograd records it (csrc/autograd.h), by the kernels of this folder.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <variant>

#include "../plan.h"
#include "draw.h"

namespace mixout::cpu {

struct Kernels {
  using Draw = cpu::Draw;
  using MixedWeight = cpu::MixedWeight;
  using WeightGradient = cpu::WeightGradient;

  bool fused, may_round;

  std::tuple<Tensor, Tensor> forward(
      const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
      const WeightGradient& gradient) const;
  Gradients backward(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
      const std::array<bool, 3>& needs, at::ScalarType bias) const;

  static Tensor keep_seed(Draw& draw);
  static void restore_seed(Draw& draw, const Tensor& seed);
  static Tensor seed_of(const Draw& draw);
  static c10::string_view name() { return "cpu"; }
  c10::string_view schedule() const { return fused ? "fused" : "staged"; }
};

struct Source {
  using Kernels = cpu::Kernels;
  using Where = std::monostate;

  FusedRule where_rounded;  // for float32 while torch's switch has it rounded
  bool may_round;

  const FusedRule& rule(const FusedRule& usual, at::ScalarType compute) const;
  Where where(c10::Device) const { return {}; }
  Kernels kernels(Where, bool fused) const { return {fused, may_round}; }
};

}  // namespace mixout::cpu

namespace mixout {
extern template class LinearPlan<cpu::Source>;
}
