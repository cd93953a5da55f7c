#include "autograd.h"

#include <array>

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/full.h>

#include "../autograd.h"
#include "mixout.h"

namespace mixout::cpu {

namespace {

struct Kernels {
  using Draw = cpu::Draw;
  using MixedWeight = cpu::MixedWeight;
  using WeightGradient = cpu::WeightGradient;

  bool fused, may_round;

  std::tuple<Tensor, Tensor> forward(
      const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
      const WeightGradient& gradient) const {
    return mix_linear(input, phi, bias, gradient, fused, may_round);
  }

  Gradients backward(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
      const std::array<bool, 3>& needs, at::ScalarType) const {
    return mix_linear_backward(grad, saved_input, phi, gradient, {needs[0], needs[1], needs[2]}, fused, may_round);
  }

  // The draw holds the seed's value. But under hooks (checkpointing) the saved input may be made anew, by a mask that is
  // drawn anew.
  static Tensor keep_seed(Draw& draw) {
    return at::SavedTensorDefaultHooks::get_tls_state().stack.empty() ? Tensor() : seed_of(draw);
  }
  static void restore_seed(Draw& draw, const Tensor& seed) {
    TORCH_CHECK(
        static_cast<uint64_t>(seed.item<int64_t>()) == draw.seed,
        "mix_linear: the forward pass was recomputed with another mask: expected the seed of the first time. "
        "Recompute it with torch's generator restored (checkpoint's preserve_rng_state=True), or give the model a "
        "MixSampler");
  }

  static Tensor seed_of(const Draw& draw) { return at::full({1}, static_cast<int64_t>(draw.seed), at::kLong); }
  static c10::string_view name() { return "cpu"; }
  c10::string_view schedule() const { return fused ? "fused" : "staged"; }
};

}  // namespace

std::tuple<Tensor, Tensor> recorded_linear(
    const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& kept_input, const WeightGradient& gradient, bool fused, bool may_round) {
  return mixout::recorded_linear(Kernels{fused, may_round}, input, phi, bias, kept_input, gradient);
}

}  // namespace mixout::cpu
