// y = x Phi^T + b and its derivatives. Fused, Phi is mixed while it is packed (fused.h); staged, it is mixed in one pass
// into a temporary and multiplied by the library behind F.linear. With a draw by column dw is a product of the kept
// columns alone, and with target zero all three products are.
#include "mixout.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "columns.h"
#include "f16_product.h"
#include "fused.h"
#include "mixer.h"
#include "precision.h"
#include "weight.h"

namespace mixout::cpu {

namespace {

// The kept columns of a weight whose others are zero: nothing else of Phi enters a product.
std::optional<Columns> nonzero_columns(const MixedWeight& phi) {
  if (phi.operand || phi.target || !phi.draw.by_column()) return std::nullopt;
  return columns_of(phi.draw, phi.weight.size(1));
}

// Phi [out, in] or [out, kept] in the compute dtype.
Tensor in_memory(const MixedWeight& phi, const std::optional<Columns>& only, at::ScalarType dtype) {
  if (phi.operand) return *phi.operand;
  const Operands operands(phi.weight, phi.target);
  if (only) return gather_weight(operands, *only, phi.draw.scale(), dtype);
  const auto& layout = operands.layout;
  const Tensor mixed = layout.empty(phi.weight, dtype);
  mix_into(mixed, operands.weight, operands.target, phi.draw, layout.of(phi.draw), phi.draw.scale());
  return layout.logical(mixed);
}

// Whether the library is to be given float32 in place of these: it has no product in float16 worth the name.
bool is_widened(const Tensor& left) { return left.scalar_type() == at::kHalf && !library_multiplies_f16(); }

// left @ right by the library, in the dtype `wanted` where it is widened and else in that of the two.
Tensor library_product(const Tensor& left, const Tensor& right, at::ScalarType wanted) {
  if (!is_widened(left)) return at::mm(left, right);
  return at::mm(left.to(at::kFloat), right.to(at::kFloat)).to(wanted);
}

// F.linear as it multiplies by a weight that requires a gradient, bit for bit: an input that is no matrix in memory is
// made one (`x`), and the bias is then added to the rounded product. at::linear asks whether its own weight requires
// one, which the operand never does.
Tensor staged_forward(
    const Tensor& input, const Tensor& x, const Tensor& operand, const std::optional<Tensor>& bias) {
  if (is_widened(x)) {
    const auto added = bias ? std::optional<Tensor>(bias->to(at::kFloat)) : std::nullopt;
    return at::linear(x.to(at::kFloat), operand.to(at::kFloat), added).to(at::kHalf);
  }
  if (input.dim() <= 2 || input.is_contiguous()) return at::linear(input, operand, bias);
  const Tensor y = at::linear(x, operand);
  return bias ? y.add_(*bias) : y;
}

// Whether the float32 products of these rows are to have bfloat16 operands now. oneDNN is not called for smaller ones.
bool is_rounded(const Tensor& left, const Tensor& weight) {
  constexpr int64_t kLeastSize = 16 * 16 * 16;
  return left.scalar_type() == at::kFloat && left.size(0) * weight.numel() > kLeastSize && float32_may_be_rounded();
}

// g Phi, [rows, in] or [rows, kept], in the dtype `result` where it is fused and else in that of g.
Tensor input_gradient(
    const Tensor& g, const MixedWeight& phi, const std::optional<Columns>& only, bool fused, at::ScalarType result) {
  if (fused) return fused_input_gradient(g, phi, only, result);
  return library_product(g, in_memory(phi, only, g.scalar_type()), g.scalar_type());
}

// scale * (g^T x[:, kept]) in the kept columns, zero in the others, in one pass over dw.
Tensor kept_columns_gradient(
    const Tensor& g, const Tensor& kept_input, const Tensor& weight, const WeightGradient& gradient,
    const Columns& columns, bool fused) {
  const int64_t width = gradient.width.value_or(columns.kept);
  TORCH_CHECK(
      kept_input.dim() == 2 && kept_input.size(0) == g.size(0) && kept_input.size(1) == width,
      "mix_linear_backward: saved_input: expected x[:, kept] as [", g.size(0), ", ", width, "] for a mask that keeps ",
      columns.kept, " of ", weight.size(1), " columns, got ", kept_input.sizes(),
      ": it was gathered with another mask");
  // A draw beyond a fixed width (probability < 2e-12) loses the gradient of the columns that did not fit.
  const int64_t n = std::min(columns.kept, width);
  const Tensor kept = kept_input.narrow(1, 0, n);
  if (fused) return fused_kept_gradient(g, kept, columns, weight, gradient.scale);
  // [kept, out]: this order measured up to 1.3 times the speed of g^T x[:, kept], the long side being contiguous.
  return scatter_weight(library_product(kept.t(), g, weight.scalar_type()), columns, weight, gradient.scale);
}

// scale * M * (g^T x), the mask regenerated over the product.
Tensor masked_gradient(
    const Tensor& g, const Tensor& x, const Tensor& weight, const WeightGradient& gradient, bool fused) {
  TORCH_CHECK(
      x.size(0) == g.size(0) && x.size(1) == weight.size(1), "mix_linear_backward: saved_input: expected x as [",
      g.size(0), ", ", weight.size(1), "], got [", x.size(0), ", ", x.size(1), "]");
  const WeightLayout layout(weight);
  const Tensor product = fused     ? fused_dense_gradient(g, x, weight)
      : layout.transposed        ? library_product(x.t(), g, at::kFloat)
                                 : library_product(g.t(), x, at::kFloat);
  const Tensor memory =
      product.scalar_type() == weight.scalar_type() ? product : layout.empty(weight, weight.scalar_type());
  mix_into(memory, product, std::nullopt, gradient.draw, layout.of(gradient.draw), gradient.scale);
  return layout.logical(memory);
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// [..., n] as [rows, n] with contiguous rows; the rows are counted, since reshape cannot infer them when n is 0.
Tensor rows_of(const Tensor& t) {
  if (t.dim() == 2 && t.stride(1) == 1 && !t.is_neg()) return t;  // each call below goes through the dispatcher
  const auto leading = t.sizes().slice(0, t.dim() - 1);
  const Tensor rows = t.resolve_neg().reshape({c10::multiply_integers(leading), t.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

}  // namespace

void mixout_list(
    const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& targets, const std::vector<Draw>& draws) {
  for (size_t k = 0; k < outs.size(); ++k) {
    const Operands operands(weights[k], targets[k]);
    mix_into(
        outs[k], operands.weight, operands.target, draws[k], operands.layout.of(draws[k]), draws[k].scale());
  }
}

std::tuple<Tensor, Tensor> mix_linear(
    const Tensor& input, const MixedWeight& phi, const std::optional<Tensor>& bias, const WeightGradient& gradient,
    bool fused, bool may_round) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;  // its bookkeeping is a third of a small layer's time
  const Tensor x = rows_of(input);
  const int64_t in_features = phi.weight.size(1);
  const std::optional<Columns> only = nonzero_columns(phi);

  Tensor saved;
  if (!gradient.draw.by_column() || gradient.width == 0) {
    saved = at::empty({x.size(0), 0}, x.options());
  } else {
    const bool same = only && gradient.draw == phi.draw;
    const Columns columns = same ? *only : columns_of(gradient.draw, in_features);
    saved = gather(x, columns, gradient.width.value_or(columns.kept));
  }

  Tensor left = x;
  if (only) {
    // What is saved has the columns of the product first, unless the gradient has a mask of its own or they do not fit.
    const bool shared = gradient.draw == phi.draw && only->kept <= saved.size(1);
    left = shared ? saved.narrow(1, 0, only->kept) : gather(x, *only, only->kept);
  }
  if (fused && may_round && is_rounded(x, phi.weight)) left = left.to(at::kBFloat16);
  const Tensor y = fused ? fused_forward(left, phi, only, bias, x.scalar_type())
                         : staged_forward(only ? left : input, left, in_memory(phi, only, x.scalar_type()), bias);
  if (input.dim() == 2) return {y, saved};
  return {at::_unsafe_view(y, with_last(input.sizes(), phi.weight.size(0))), saved};
}

std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Tensor& grad, const Tensor& saved_input, const MixedWeight& phi, const WeightGradient& gradient,
    std::tuple<bool, bool, bool> needs, bool fused, bool may_round) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto [needs_dx, needs_dw, needs_db] = needs;
  const Tensor& weight = phi.weight;
  const Tensor g = rows_of(grad);
  const std::optional<Columns> only = needs_dx ? nonzero_columns(phi) : std::nullopt;

  Tensor left = g, saved = saved_input, dx, dw, db;
  if (fused && may_round && is_rounded(g, weight)) {
    left = g.to(at::kBFloat16);
    if (needs_dw) saved = saved_input.to(at::kBFloat16);
  }
  if (needs_dx) {
    dx = input_gradient(left, phi, only, fused, g.scalar_type());
    if (only) dx = scatter(dx, *only, weight.size(1));
    if (grad.dim() != 2) dx = dx.view(with_last(grad.sizes(), weight.size(1)));
  }
  if (needs_dw && gradient.draw.by_column()) {
    const bool same = only && gradient.draw == phi.draw;
    const Columns columns = same ? *only : columns_of(gradient.draw, weight.size(1));
    dw = kept_columns_gradient(left, saved, weight, gradient, columns, fused);
  } else if (needs_dw) {
    dw = masked_gradient(left, rows_of(saved), weight, gradient, fused);
  }
  if (needs_db) db = g.sum(0);
  return {
      needs_dx ? dx : at::empty({0}, grad.options()), needs_dw ? dw : at::empty({0}, weight.options()),
      needs_db ? db : at::empty({0}, grad.options())};
}

}  // namespace mixout::cpu
