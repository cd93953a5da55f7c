// Calls of the layer that differ in their tensors alone. What mixout_kernels decides for a call in Python (checks.linear,
// functional.sampled_linear, and the backend's choice of a schedule) is decided here once for all of them; each call only
// looks whether it is one of them. One that is not is left to Python, which is the reference of this and has the errors.
#pragma once

#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "autograd.h"

namespace mixout {

// Which calls fuse: those with fewer rows than these, without and with an operand; `aligned`, only where no address and
// no size leaves a kernel without 16-byte accesses. It stands for the backend's choice in Python.
struct FusedRule {
  int64_t rows, rows_with_operand;
  bool aligned;

  bool operator()(const Tensor& x, const Tensor& weight, const Tensor& target, bool has_operand) const {
    if (x.numel() / x.size(-1) >= (has_operand ? rows_with_operand : rows)) return false;
    if (!aligned) return true;
    uintptr_t addresses = 0;
    for (const Tensor& t : {x, weight, target})
      if (t.defined()) addresses |= reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return addresses % 16 == 0 && weight.size(0) % 8 == 0 && weight.size(1) % 8 == 0;
  }
};

// backends/contract.LinearCall.
struct LinearCall {
  int64_t out_features, in_features;
  at::ScalarType weight;
  std::optional<at::ScalarType> target;
  at::ScalarType compute;
  double p;
  c10::SmallVector<int64_t, 4> strides;
  int64_t offset;
  double q, scale;
  std::optional<int64_t> width;  // of x[:, kept] where a gradient of the weight is wanted
};

// Whether what follows may go past the dispatcher: nothing traces, transforms or intercepts operators.
inline bool nothing_intercepts() {
  // torch.func: the key is included while there is a transform.
  const bool transforms = c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
  return !transforms && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

// `Source` makes the `Kernels` of a call: `kernels(where, fused)`, where `where(device)` was asked with Python's lock held;
// and says which rule is that of the moment: `rule(usual, compute dtype)`.
template <typename Source>
class LinearPlan {
 public:
  using Kernels = typename Source::Kernels;
  using Draw = typename Kernels::Draw;

  LinearPlan(const LinearCall& call, const FusedRule& fuses, const Source& source, at::DeviceType device)
      : call_(call), fuses_(fuses), source_(source), device_(device) {
    draw_.p = call.p, gradient_draw_.p = call.q;
    draw_.strides = gradient_draw_.strides = call.strides;
    draw_.offset = gradient_draw_.offset = call.offset;
  }

  at::ScalarType compute() const { return call_.compute; }

  // Tensors that are not there are undefined.
  bool fits(
      const Tensor& input, const Tensor& weight, const Tensor& target, const Tensor& bias, const Tensor& operand,
      const Tensor& seed) const {
    if (!input.defined() || !weight.defined()) return false;
    const auto device = weight.device();
    if (device.type() != device_ || !is_plain(weight) || weight.dim() != 2 || weight.size(0) != call_.out_features ||
        weight.size(1) != call_.in_features || weight.scalar_type() != call_.weight)
      return false;
    if (seed.defined() && seed.device() != device) return false;
    if (!is_plain(input) || input.dim() == 0 || input.size(-1) != call_.in_features || input.numel() == 0 ||
        input.device() != device)
      return false;
    const auto dtype = input.scalar_type();
    const bool autocast = at::autocast::is_autocast_enabled(device_);
    if (!at::isFloatingType(dtype) || (!autocast && dtype != call_.weight)) return false;
    const bool casts = autocast && dtype != at::kDouble;
    if ((casts ? at::autocast::get_autocast_dtype(device_) : dtype) != call_.compute) return false;
    if (target.defined() != call_.target.has_value()) return false;
    if (target.defined() && (!is_plain(target) || target.scalar_type() != *call_.target || target.device() != device ||
                             target.sizes() != weight.sizes() || target.requires_grad()))
      return false;
    if (bias.defined() && (!is_plain(bias) || bias.dim() != 1 || bias.size(0) != call_.out_features ||
                           bias.device() != device || !at::isFloatingType(bias.scalar_type()) ||
                           (!autocast && bias.scalar_type() != call_.weight)))
      return false;
    if (operand.defined() && operand.scalar_type() != call_.compute) return false;
    return nothing_intercepts();
  }

  typename Source::Where where(c10::Device device) const { return source_.where(device); }

  // y, x[:, kept] and x, the input in the compute dtype. `cast` and `kept_input` are what a sibling made of this input; a
  // seed that is undefined is drawn from the device's default generator.
  std::tuple<Tensor, Tensor, Tensor> operator()(
      const typename Source::Where& where, const Tensor& input, const Tensor& weight, const Tensor& target,
      const Tensor& bias, const Tensor& operand, const Tensor& cast, const Tensor& kept_input, const Tensor& seed) const {
    const Tensor x = cast.defined() ? cast : input.to(call_.compute);
    typename Kernels::MixedWeight phi{weight, or_none(target), or_none(operand), draw_};
    typename Kernels::WeightGradient gradient{gradient_draw_, call_.scale, 0};
    if (!phi.operand) phi.operand = unmixed(weight, target);
    const Tensor drawn = seed.defined() ? seed : fresh_seed(weight.device());
    read_seed(drawn, phi.draw);
    read_seed(drawn, gradient.draw);
    if (call_.q < 1 && gradient.draw.by_column() && at::GradMode::is_enabled() && weight.requires_grad())
      gradient.width = call_.width;
    const bool fused = source_.rule(fuses_, call_.compute)(x, weight, target, phi.operand.has_value());
    auto [y, kept] =
        recorded_linear(source_.kernels(where, fused), x, phi, or_none(bias), or_none(kept_input), gradient);
    return {y, kept, x};
  }

 private:
  static bool is_plain(const Tensor& t) {
    return t.layout() == at::kStrided && !t.is_nested() && !t.is_neg() && !t._is_zerotensor();
  }

  // Where nothing is mixed the product has its operand already.
  std::optional<Tensor> unmixed(const Tensor& weight, const Tensor& target) const {
    if (call_.p == 0) return weight.detach().to(call_.compute);
    if (call_.p < 1) return std::nullopt;
    return target.defined() ? target.to(call_.compute)
                            : at::zeros_like(weight, weight.options().dtype(call_.compute).requires_grad(false));
  }

  // As draws.fresh_seed draws it, so that torch.manual_seed governs both alike.
  static Tensor fresh_seed(c10::Device device) {
    constexpr auto kLow = std::numeric_limits<int64_t>::min(), kHigh = std::numeric_limits<int64_t>::max();
    return at::randint(kLow, kHigh, {1}, at::TensorOptions().dtype(at::kLong).device(device));
  }

  const LinearCall call_;
  const FusedRule fuses_;
  const Source source_;
  const at::DeviceType device_;
  Draw draw_, gradient_draw_;
};

}  // namespace mixout
