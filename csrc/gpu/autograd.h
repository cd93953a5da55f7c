// The linear layer as autograd records it (csrc/autograd.h), by the kernels of csrc/cuda.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <tuple>
#include <utility>

#include "../plan.h"
#include "linear.h"

namespace mixout::gpu {

struct Kernels {
  using Draw = gpu::Draw;
  using MixedWeight = gpu::MixedWeight;
  using WeightGradient = gpu::WeightGradient;

  Launch launch;

  std::tuple<Tensor, Tensor> forward(
      const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
      const WeightGradient& gradient) const {
    return mix_linear(launch, input, phi, bias, gradient);
  }
  Gradients backward(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
      const std::array<bool, 3>& needs, at::ScalarType bias) const {
    return mix_linear_backward(launch, grad, saved_input, phi, gradient, needs, bias);
  }

  // The seed is read on the device, in backward once more: autograd keeps it, and sees to it that it is the same.
  static Tensor keep_seed(Draw& draw) { return std::move(draw.seed); }
  static void restore_seed(Draw& draw, const Tensor& seed) { draw.seed = seed; }

  static Tensor seed_of(const Draw& draw) { return draw.seed; }
  static c10::string_view name() { return "cuda"; }
  c10::string_view schedule() const { return launch.fused ? "fused" : "staged"; }
};

struct Source {
  using Kernels = gpu::Kernels;
  using Where = void*;  // the current stream

  const cuda::Launchers* launchers;
  std::function<void*(c10::DeviceIndex)> stream;  // Python knows it, since torch's header for it includes CUDA's

  const FusedRule& rule(const FusedRule& usual, at::ScalarType) const { return usual; }
  Where where(c10::Device device) const { return stream(device.index()); }
  Kernels kernels(Where stream, bool fused) const { return {{launchers, stream, fused}}; }
};

}  // namespace mixout::gpu

namespace mixout {
extern template class LinearPlan<gpu::Source>;
}
