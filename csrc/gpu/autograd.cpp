#include "autograd.h"

#include "../autograd.h"

namespace mixout::gpu {

namespace {

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

}  // namespace

std::tuple<Tensor, Tensor> recorded_linear(
    const Launch& launch, const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& kept_input, const WeightGradient& gradient) {
  return mixout::recorded_linear(Kernels{launch}, input, phi, bias, kept_input, gradient);
}

}  // namespace mixout::gpu
