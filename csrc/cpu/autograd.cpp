#include "autograd.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/full.h>

#include "mixout.h"
#include "precision.h"

namespace mixout::cpu {

std::tuple<Tensor, Tensor> Kernels::forward(
    const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const WeightGradient& gradient) const {
  return mix_linear(input, phi, bias, gradient, fused, may_round);
}

Gradients Kernels::backward(
    const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
    const std::array<bool, 3>& needs, at::ScalarType) const {
  return mix_linear_backward(grad, saved_input, phi, gradient, {needs[0], needs[1], needs[2]}, fused, may_round);
}

// The draw holds the seed's value. But under hooks (checkpointing) the saved input may be made anew, by a mask that is
// drawn anew.
Tensor Kernels::keep_seed(Draw& draw) {
  return at::SavedTensorDefaultHooks::get_tls_state().stack.empty() ? Tensor() : seed_of(draw);
}

void Kernels::restore_seed(Draw& draw, const Tensor& seed) {
  TORCH_CHECK(
      static_cast<uint64_t>(seed.item<int64_t>()) == draw.seed,
      "mix_linear: the forward pass was recomputed with another mask: expected the seed of the first time. "
      "Recompute it with torch's generator restored (checkpoint's preserve_rng_state=True), or give the model a "
      "MixSampler");
}

Tensor Kernels::seed_of(const Draw& draw) { return at::full({1}, static_cast<int64_t>(draw.seed), at::kLong); }

const FusedRule& Source::rule(const FusedRule& usual, at::ScalarType compute) const {
  return compute == at::kFloat && may_round && float32_may_be_rounded() ? where_rounded : usual;
}

}  // namespace mixout::cpu

template class mixout::LinearPlan<mixout::cpu::Source>;
