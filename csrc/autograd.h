// The linear layer as autograd records it, once for all backends: what mixout_kernels/ops.py does in MixLinearFunction,
// which is the reference of this, without Python.
//
// A backend is given by its `Kernels`, a small value that a node keeps:
//
//   Draw, MixedWeight, WeightGradient      its records (backends/contract.py)
//   std::tuple<y, kept> forward(input, phi, bias, gradient) const
//   std::tuple<dx, dw, db> backward(grad, saved_input, phi, gradient, needs, bias dtype) const
//   static Tensor keep_seed(Draw&)         what is to be saved of the seed, undefined if the draw itself holds it
//   static void restore_seed(Draw&, seed)  the draw of backward, from what was saved
//   Tensor seed_of(const Draw&) const, name(), schedule()      as the registered operator takes them
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace mixout {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

inline Tensor or_undefined(const std::optional<Tensor>& t) { return t ? *t : Tensor(); }
inline std::optional<Tensor> or_none(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

template <typename Kernels>
class MixLinearBackward : public torch::autograd::Node {
 public:
  using Draw = typename Kernels::Draw;
  using MixedWeight = typename Kernels::MixedWeight;
  using WeightGradient = typename Kernels::WeightGradient;

  MixLinearBackward(
      torch::autograd::edge_list&& edges, const Kernels& kernels, const Tensor& saved_input, const MixedWeight& phi,
      const WeightGradient& gradient, const Tensor& bias)
      : Node(std::move(edges)), kernels_(kernels), draw_(phi.draw), gradient_(gradient) {
    if (bias.defined()) bias_dtype_ = bias.scalar_type();
    saved_input_ = SavedVariable(saved_input, false);
    weight_ = SavedVariable(phi.weight, false);
    target_ = SavedVariable(or_undefined(phi.target), false);
    operand_ = SavedVariable(or_undefined(phi.operand), false);
    Kernels::keep_seed(gradient_.draw);
    seed_ = SavedVariable(Kernels::keep_seed(draw_), false);
  }

  std::string name() const override { return "MixLinearBackward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& grad = gradients[0];
    if (!grad.defined()) return torch::autograd::variable_list(3);
    const Tensor saved_input = saved_input_.unpack(), weight = weight_.unpack();
    MixedWeight phi{weight, or_none(target_.unpack()), or_none(operand_.unpack()), draw_};
    WeightGradient gradient = gradient_;
    if (const Tensor seed = seed_.unpack(); seed.defined()) {
      Kernels::restore_seed(phi.draw, seed);
      Kernels::restore_seed(gradient.draw, seed);
    }
    const std::array<bool, 3> needs{
        task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
    const bool traced = at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
        grad.unsafeGetTensorImpl()->is_python_dispatch();
    auto [dx, dw, db] = traced ? by_operator(grad, saved_input, phi, gradient, needs)
                               : by_kernel(grad, saved_input, phi, gradient, needs);
    if (needs[2] && db.scalar_type() != bias_dtype_) db = db.to(bias_dtype_);
    return {needs[0] ? dx : Tensor(), needs[1] ? dw : Tensor(), needs[2] ? db : Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&saved_input_, &weight_, &target_, &operand_, &seed_}) saved->reset_data();
  }

 private:
  using SavedVariable = torch::autograd::SavedVariable;

  Gradients by_kernel(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
      const std::array<bool, 3>& needs) const {
    const bool nothing_kept = needs[1] && gradient.draw.p >= 1;
    Gradients result = kernels_.backward(
        grad, saved_input, phi, gradient, {needs[0], needs[1] && !nothing_kept, needs[2]}, bias_dtype_);
    if (nothing_kept) std::get<1>(result) = at::zeros_like(phi.weight);
    return result;
  }

  // What records or intercepts operators must see one. A graph of the gradients (create_graph=True) finds there that it
  // has no derivative.
  Gradients by_operator(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
      const std::array<bool, 3>& needs) const {
    using Operator = Gradients(
        const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
        const Tensor&, double, at::IntArrayRef, int64_t, double, double, std::optional<c10::SymInt>, c10::string_view,
        c10::string_view, std::array<bool, 3>);
    static const auto operation =
        c10::Dispatcher::singleton().findSchemaOrThrow("mixout_kernels::mix_linear_backward", "").typed<Operator>();
    const auto width = gradient.width ? std::optional<c10::SymInt>(*gradient.width) : std::nullopt;
    return operation.call(
        grad, saved_input, phi.weight, phi.target, phi.operand, kernels_.seed_of(phi.draw), phi.draw.p,
        phi.draw.strides, phi.draw.offset, gradient.draw.p, gradient.scale, width, kernels_.name(),
        kernels_.schedule(), needs);
  }

  std::mutex mutex_;
  const Kernels kernels_;
  Draw draw_;
  WeightGradient gradient_;
  at::ScalarType bias_dtype_ = at::kFloat;
  SavedVariable saved_input_, weight_, target_, operand_, seed_;
};

// Nodes are counted by std::shared_ptr in older versions of torch, and by c10::intrusive_ptr in newer ones.
template <typename T, typename... Arguments>
auto make_node(Arguments&&... arguments) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<T>(std::forward<Arguments>(arguments)...);
  else
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
}

// y and x[:, kept], with the derivatives of x, w and b. `kept_input`: x[:, kept] where a sibling has gathered it. The
// bias may have another dtype than the input, as under autocast: it is cast here, and its gradient is rounded once.
template <typename Kernels>
std::tuple<Tensor, Tensor> recorded_linear(
    const Kernels& kernels, const Tensor& input, const typename Kernels::MixedWeight& phi,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& kept_input,
    const typename Kernels::WeightGradient& gradient) {
  auto forward = gradient;
  if (kept_input) forward.width = 0;
  std::optional<Tensor> added = bias;
  if (bias && (bias->scalar_type() != input.scalar_type() || !bias->is_contiguous())) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // the node below has its derivative
    added = bias->to(input.scalar_type()).contiguous();
  }
  auto [y, kept] = kernels.forward(input, phi, added, forward);
  const Tensor b = or_undefined(bias);
  if (!torch::autograd::compute_requires_grad(input, phi.weight, b)) return {y, kept};

  Tensor saved_input;
  if (!phi.weight.requires_grad() || gradient.draw.p >= 1) {
    saved_input = at::empty({0}, input.options());
  } else if (!gradient.draw.by_column()) {
    saved_input = input;
  } else {
    TORCH_CHECK(
        kept_input || gradient.width != 0,
        "mix_linear: weight requires grad, but width=0 keeps no input for its gradient");
    saved_input = kept_input ? *kept_input : kept;
  }
  const auto node = make_node<MixLinearBackward<Kernels>>(
      torch::autograd::collect_next_edges(input, phi.weight, b), kernels, saved_input, phi, gradient, b);
  torch::autograd::set_history(y, node);
  return {y, kept};
}

}  // namespace mixout
