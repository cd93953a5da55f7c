#include "autograd.h"

#include <array>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "mixout.h"

namespace mixout::cpu {

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

Tensor or_undefined(const std::optional<Tensor>& t) { return t ? *t : Tensor(); }
std::optional<Tensor> or_none(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

Tensor seed_tensor(uint64_t seed) { return at::full({1}, static_cast<int64_t>(seed), at::kLong); }

class MixLinearBackward : public torch::autograd::Node {
 public:
  MixLinearBackward(torch::autograd::edge_list&& edges, const Draw& draw, const WeightGradient& gradient, bool fused)
      : Node(std::move(edges)), draw_(draw), gradient_(gradient), fused_(fused) {}

  std::string name() const override { return "MixLinearBackward"; }

  void save(const Tensor& saved_input, const MixedWeight& phi) {
    saved_input_ = SavedVariable(saved_input, false);
    weight_ = SavedVariable(phi.weight, false);
    target_ = SavedVariable(or_undefined(phi.target), false);
    operand_ = SavedVariable(or_undefined(phi.operand), false);
    // Under hooks (checkpointing) the saved input may be made anew, by a mask that is drawn anew.
    if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty())
      seed_ = SavedVariable(seed_tensor(draw_.seed), false);
  }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& grad = gradients[0];
    if (!grad.defined()) return variable_list(3);
    const Tensor saved_input = saved_input_.unpack(), weight = weight_.unpack();
    const MixedWeight phi{weight, or_none(target_.unpack()), or_none(operand_.unpack()), draw_};
    if (const Tensor seed = seed_.unpack(); seed.defined())
      TORCH_CHECK(
          static_cast<uint64_t>(seed.item<int64_t>()) == draw_.seed,
          "mix_linear: the forward pass was recomputed with another mask: expected the seed of the first time. "
          "Recompute it with torch's generator restored (checkpoint's preserve_rng_state=True), or give the model a "
          "MixSampler");
    const std::array<bool, 3> needs{
        task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
    const bool traced = at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
        grad.unsafeGetTensorImpl()->is_python_dispatch();
    auto [dx, dw, db] = traced ? by_operator(grad, saved_input, phi, needs) : by_kernel(grad, saved_input, phi, needs);
    return {needs[0] ? dx : Tensor(), needs[1] ? dw : Tensor(), needs[2] ? db : Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&saved_input_, &weight_, &target_, &operand_, &seed_}) saved->reset_data();
  }

 private:
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;

  Gradients by_kernel(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const std::array<bool, 3>& needs) const {
    const bool nothing_kept = needs[1] && gradient_.draw.p >= 1;
    Gradients result = mix_linear_backward(
        grad, saved_input, phi, gradient_, {needs[0], needs[1] && !nothing_kept, needs[2]}, fused_);
    if (nothing_kept) std::get<1>(result) = at::zeros_like(phi.weight);
    return result;
  }

  // What records or intercepts operators must see one. A graph of the gradients (create_graph=True) finds there that it
  // has no derivative.
  Gradients by_operator(
      const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const std::array<bool, 3>& needs) const {
    using Operator = Gradients(
        const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
        const Tensor&, double, at::IntArrayRef, int64_t, double, double, std::optional<c10::SymInt>, c10::string_view,
        c10::string_view, std::array<bool, 3>);
    static const auto operation =
        c10::Dispatcher::singleton().findSchemaOrThrow("mixout_kernels::mix_linear_backward", "").typed<Operator>();
    const auto width = gradient_.width ? std::optional<c10::SymInt>(*gradient_.width) : std::nullopt;
    return operation.call(
        grad, saved_input, phi.weight, phi.target, phi.operand, seed_tensor(draw_.seed), draw_.p, draw_.strides,
        draw_.offset, gradient_.draw.p, gradient_.scale, width, "cpu", fused_ ? "fused" : "staged", needs);
  }

  std::mutex mutex_;
  const Draw draw_;
  const WeightGradient gradient_;
  const bool fused_;
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

}  // namespace

std::tuple<Tensor, Tensor> recorded_linear(
    const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& kept_input, const WeightGradient& gradient, bool fused) {
  WeightGradient forward = gradient;
  if (kept_input) forward.width = 0;
  auto [y, kept] = mix_linear(input, phi, bias, forward, fused);
  const Tensor b = or_undefined(bias);
  if (!torch::autograd::compute_requires_grad(input, phi.weight, b)) return {y, kept};

  const auto node = make_node<MixLinearBackward>(
      torch::autograd::collect_next_edges(input, phi.weight, b), phi.draw, gradient, fused);
  Tensor saved_input = at::empty({0}, input.options());
  if (phi.weight.requires_grad() && gradient.draw.p < 1) {
    if (!gradient.draw.by_column()) {
      saved_input = input;
    } else {
      TORCH_CHECK(
          kept_input || gradient.width != 0,
          "mix_linear: weight requires grad, but width=0 keeps no input for its gradient");
      saved_input = kept_input ? *kept_input : kept;
    }
  }
  node->save(saved_input, phi);
  torch::autograd::set_history(y, node);
  return {y, kept};
}

}  // namespace mixout::cpu
