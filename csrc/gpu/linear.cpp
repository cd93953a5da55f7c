#include "linear.h"

#include <algorithm>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

namespace mixout::gpu {

namespace {

using cuda::Type;

// What every call of torch here is spared: autograd's bookkeeping, and autocast, since all dtypes are chosen.
struct Below {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::DeviceGuard device;

  explicit Below(const Tensor& on) : device(on.device()) {}
};

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: TORCH_CHECK(false, "mixout_kernels: no CUDA kernel for ", t.scalar_type());
  }
}

const void* address(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Whether the transpose is what lies in memory row by row.
bool is_transposed(const Tensor& matrix) { return !matrix.is_contiguous() && matrix.t().is_contiguous(); }

bool result_is_transposed(const Tensor& out) {
  const bool transposed = is_transposed(out);
  TORCH_CHECK_VALUE(
      transposed || out.is_contiguous(), "the cuda backend writes matrices without gaps, got ", out.sizes(), " with ",
      out.strides());
  return transposed;
}

Tensor in_memory(const Tensor& matrix, bool transposed) { return (transposed ? matrix.t() : matrix).contiguous(); }
std::optional<Tensor> in_memory(const std::optional<Tensor>& matrix, bool transposed) {
  return matrix ? std::optional<Tensor>(in_memory(*matrix, transposed)) : std::nullopt;
}

cuda::Mask mask_of(const Draw& draw, bool transposed = false) {
  const Strides strides{draw.offset, draw.strides[0], draw.strides[1]};
  return {
      draw.seed.const_data_ptr<int64_t>(), transposed ? strides.transposed() : strides,
      static_cast<uint32_t>(keep_threshold(draw.p)), 1};
}

// [rows, features], each row contiguous; the rows are counted, since reshape cannot infer them for 0 features.
Tensor rows_of(const Tensor& t) {
  const int64_t features = t.size(-1);
  const auto leading = t.sizes().slice(0, t.dim() - 1);
  const Tensor rows = t.dim() == 2 ? t : t.reshape({c10::multiply_integers(leading), features});
  return rows.stride(1) == 1 && rows.stride(0) >= features ? rows : rows.contiguous();
}

c10::SmallVector<int64_t, 6> with_last(at::IntArrayRef sizes, int64_t last) {
  c10::SmallVector<int64_t, 6> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// Writes where(keep, u + (w - u) * factor, u) into `out`, which may be w.
void mix_into(
    const Launch& launch, const Tensor& out, const Tensor& weight, const std::optional<Tensor>& target,
    const Draw& draw, double factor) {
  const bool transposed = result_is_transposed(out);
  const Tensor w = in_memory(weight, transposed);
  const std::optional<Tensor> u = in_memory(target, transposed);
  const cuda::MixTensor record{
      w.const_data_ptr(), address(u), out.mutable_data_ptr(), mask_of(draw, transposed), out.numel(),
      out.size(transposed ? 0 : 1), static_cast<float>(factor)};
  launch.launchers->mix(&record, 1, type_of(w), type_of(u ? *u : w), type_of(out), launch.stream);
}

// Phi in memory, in the layout of the weight.
Tensor mixed(const Launch& launch, const MixedWeight& phi, at::ScalarType dtype) {
  if (phi.operand) return *phi.operand;
  const Tensor out = at::empty_like(phi.weight, phi.weight.options().dtype(dtype));
  mix_into(launch, out, phi.weight, phi.target, phi.draw, phi.draw.scale());
  return out;
}

// x Phi^T + bias for Phi like weight [outputs, contraction], never in memory.
Tensor mix_product(
    const Launch& launch, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target,
    const std::optional<Tensor>& bias, const Draw& draw, const cuda::Mask& mask) {
  const Tensor x = input.contiguous();
  const bool transposed = is_transposed(weight);
  const Tensor w = in_memory(weight, transposed);
  const std::optional<Tensor> u = in_memory(target, transposed);
  const int64_t rows = x.size(0), outputs = weight.size(0), contraction = weight.size(1);
  const Tensor out = at::empty({rows, outputs}, x.options());
  const auto& launchers = *launch.launchers;
  const auto plan = launchers.plan(rows, outputs, contraction, type_of(w), type_of(x), launchers.processors());
  Tensor partial, own_arrivals;
  uint32_t* arrivals = nullptr;
  if (plan.partial_floats) partial = at::empty({plan.partial_floats}, x.options().dtype(at::kFloat));
  if (plan.arrivals && !(arrivals = launchers.arrivals(plan.arrivals, launch.stream))) {
    own_arrivals = at::zeros({plan.arrivals}, x.options().dtype(at::kInt));
    arrivals = reinterpret_cast<uint32_t*>(own_arrivals.mutable_data_ptr<int32_t>());
  }
  const cuda::Product product{
      x.const_data_ptr(), w.const_data_ptr(), address(u), address(bias), out.mutable_data_ptr(), mask,
      static_cast<float>(draw.scale()), rows, outputs, contraction, !transposed};
  launchers.product(
      product, plan, type_of(w), type_of(u ? *u : w), type_of(x),
      partial.defined() ? partial.mutable_data_ptr<float>() : nullptr, arrivals, launch.stream);
  return out;
}

Tensor gather_columns(const Launch& launch, const Tensor& input, const Draw& draw, int64_t width) {
  const Tensor x = input.contiguous();
  const Tensor compact = at::empty({x.size(0), width}, x.options());
  launch.launchers->gather(
      mask_of(draw), x.const_data_ptr(), compact.mutable_data_ptr(), type_of(x), x.size(0), x.size(1), width,
      launch.stream);
  return compact;
}

// And db = sum of the rows of g, where it is defined.
void scatter_columns(
    const Launch& launch, const Tensor& compact, const Tensor& out, const Draw& draw, double scale, const Tensor& g,
    const Tensor& db) {
  cuda::ColumnSums sums{};
  if (db.defined()) sums = {g.const_data_ptr(), db.mutable_data_ptr(), type_of(db), g.size(0), g.stride(0)};
  const bool transposed = result_is_transposed(out);
  const Tensor memory = in_memory(compact, transposed);
  launch.launchers->scatter(
      mask_of(draw), memory.const_data_ptr(), out.mutable_data_ptr(), type_of(memory), type_of(out),
      static_cast<float>(scale), out.size(0), out.size(1), compact.size(1), transposed, sums, launch.stream);
}

// dw by the vendor's GEMM and one pass over it, in the memory order of the weight; and db, of dtype `bias`, where that
// pass can take it along.
std::tuple<Tensor, Tensor> weight_gradient(
    const Launch& launch, const Tensor& g, const Tensor& saved, const Tensor& weight, const WeightGradient& gradient,
    std::optional<at::ScalarType> bias) {
  Tensor dw = at::empty_like(weight), db;
  // [in or kept, out] where dw lies so: the pass over it then reads and writes along rows.
  const bool turned = dw.stride(0) == 1 && dw.size(1) > 1;
  const Tensor product = turned ? at::mm(saved.t(), g).t() : at::mm(g.t(), saved);
  if (gradient.draw.by_column()) {
    if (bias && g.numel() && (*bias == g.scalar_type() || *bias == at::kFloat))
      db = at::empty({weight.size(0)}, g.options().dtype(*bias));
    scatter_columns(launch, product, dw, gradient.draw, gradient.scale, g, db);
    return {dw, db};
  }
  if (product.scalar_type() == dw.scalar_type() && product.strides() == dw.strides()) dw = product;
  mix_into(launch, dw, product, std::nullopt, gradient.draw, gradient.scale);
  return {dw, db};
}

}  // namespace

std::tuple<Tensor, Tensor> mix_linear(
    const Launch& launch, const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias,
    const WeightGradient& gradient) {
  const Below below(input);
  const Tensor x = rows_of(input);
  TORCH_INTERNAL_ASSERT(gradient.width, "a width that depends on the mask cannot be known on a device");
  Tensor y;
  if (launch.fused && !phi.operand) {
    y = mix_product(launch, x, phi.weight, phi.target, bias, phi.draw, mask_of(phi.draw));
  } else {
    const Tensor operand = mixed(launch, phi, x.scalar_type()).t();
    y = bias ? at::addmm(*bias, x, operand) : at::mm(x, operand);
  }
  Tensor kept = *gradient.width ? gather_columns(launch, x, gradient.draw, *gradient.width)
                                : at::empty({x.size(0), 0}, x.options());
  if (input.dim() != 2) y = at::_unsafe_view(y, with_last(input.sizes(), phi.weight.size(0)));
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Launch& launch, const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi,
    const WeightGradient& gradient, const std::array<bool, 3>& needs, at::ScalarType bias) {
  const Below below(grad);
  const auto [needs_dx, needs_dw, needs_db] = needs;
  const Tensor& weight = phi.weight;
  const Tensor g = rows_of(grad);
  Tensor dx, dw, db;
  if (needs_dx) {
    if (launch.fused && !phi.operand) {
      const std::optional<Tensor> target = phi.target ? std::optional<Tensor>(phi.target->t()) : std::nullopt;
      dx = mix_product(launch, g, weight.t(), target, std::nullopt, phi.draw, mask_of(phi.draw, true));
    } else {
      dx = at::mm(g, mixed(launch, phi, g.scalar_type()));
    }
    if (grad.dim() != 2) dx = dx.view(with_last(grad.sizes(), weight.size(1)));
  }
  if (needs_dw) {
    const Tensor saved = rows_of(saved_input);
    const int64_t expected = gradient.draw.by_column() ? *gradient.width : weight.size(1);
    TORCH_CHECK(
        saved.size(1) == expected, "mix_linear: the saved input: expected ", expected, " columns, got ",
        saved.size(1), ": it was gathered by another mask");
    std::tie(dw, db) =
        weight_gradient(launch, g, saved, weight, gradient, needs_db ? std::optional(bias) : std::nullopt);
  }
  if (needs_db && !db.defined()) db = at::sum(g, at::IntArrayRef{0}, false, bias);
  return {dx, dw, db};
}

}  // namespace mixout::gpu
