// y = x Phi^T + b and its derivatives. Fused, Phi is mixed while product.cpp packs it; staged, it is mixed in one pass into
// a temporary and multiplied by the vendor library. With a neuron mask dw is a product of the kept columns alone, and
// with target zero all three products are.
#include "mixout.h"

#include <algorithm>
#include <memory>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include "../mix.h"
#include "kernels.h"

namespace mixout::cpu {

namespace {

constexpr int64_t kGrain = 16384;

struct Columns {
  std::vector<int64_t> index;
  int64_t kept;
};

Columns kept(const Tensor& seed, double p, int64_t in_features) {
  Columns columns{std::vector<int64_t>(in_features + 1), 0};
  if (p < 1)
    columns.kept = kept_columns(
        seed_value(seed), static_cast<uint32_t>(keep_threshold(p)), in_features, columns.index.data());
  return columns;
}

// Calls f(T, O) for a float32 value in the compute type O, or one type for both.
#define MIXOUT_DISPATCH_COLUMNS(value_type, compute_type, ...)                                   \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, compute_type, "mix_linear", [&] {    \
    using compute_t = scalar_t;                                                                  \
    if (value_type == at::kFloat && !std::is_same_v<compute_t, double>) {                        \
      using value_t = float;                                                                     \
      __VA_ARGS__();                                                                             \
    } else {                                                                                     \
      TORCH_CHECK(value_type == compute_type, "mixout_kernels: no CPU kernel computes a ",       \
                  value_type, " weight in ", compute_type);                                      \
      using value_t = scalar_t;                                                                  \
      __VA_ARGS__();                                                                             \
    }                                                                                            \
  })

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// scale * x[:, kept] in `dtype`, the columns beyond the kept ones zero.
Tensor gather(const Tensor& x, const Columns& columns, int64_t width, double scale, at::ScalarType dtype) {
  const Tensor out = at::empty({x.size(0), width}, x.options().dtype(dtype));
  const int64_t n = std::min(columns.kept, width);
  MIXOUT_DISPATCH_COLUMNS(x.scalar_type(), dtype, [&] {
    const auto* from = x.const_data_ptr<value_t>();
    auto* to = out.mutable_data_ptr<compute_t>();
    at::parallel_for(0, x.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      gather_columns(
          from + begin * x.stride(0), x.stride(0), to + begin * width, width, columns.index.data(), n,
          static_cast<arithmetic_t<value_t>>(scale), end - begin);
    });
  });
  return out;
}

// A weight lies in memory as [out, in], or as [in, out]: the transpose of a Conv1D weight. Both are mixed and
// differentiated in place, without a copy; any other layout is made contiguous first.
struct WeightLayout {
  bool transposed;
  int64_t out_features, in_features;

  explicit WeightLayout(const Tensor& weight)
      : transposed(!weight.is_contiguous() && weight.t().is_contiguous()),
        out_features(weight.size(0)),
        in_features(weight.size(1)) {}

  Tensor memory(const Tensor& weight) const { return transposed ? weight.t() : weight.contiguous(); }
  Tensor empty(const Tensor& like, at::ScalarType dtype) const {
    const auto options = like.options().dtype(dtype);
    return transposed ? at::empty({in_features, out_features}, options)
                      : at::empty({out_features, in_features}, options);
  }
  Tensor logical(const Tensor& memory) const { return transposed ? memory.t() : memory; }
  MaskLayout mask(bool per_weight) const {
    return transposed ? MaskLayout{1, in_features, out_features, per_weight, true}
                      : MaskLayout{out_features, in_features, 1, per_weight};
  }
};

// A weight and its target as they lie in memory.
struct Operands {
  WeightLayout layout;
  Tensor weight;
  std::optional<Tensor> target;

  Operands(const Tensor& w, const std::optional<Tensor>& u)
      : layout(w),
        weight(layout.memory(w)),
        target(u ? std::optional<Tensor>(layout.transposed ? u->t().contiguous() : u->contiguous()) : std::nullopt) {}
};

Tensor index_tensor(const Columns& columns) {
  return at::from_blob(const_cast<int64_t*>(columns.index.data()), {columns.kept}, at::TensorOptions(at::kLong));
}

class DenseRows : public Rows {
 public:
  explicit DenseRows(const Tensor& memory) : memory_(memory) {}
  void write(int64_t row, int64_t first, int64_t n, float* out) const override {
    std::copy_n(memory_.const_data_ptr<float>() + row * memory_.size(1) + first, n, out);
  }

 private:
  Tensor memory_;
};

// The kept columns of scale * w: rows of the memory, or parts of each.
class KeptRows : public Rows {
 public:
  KeptRows(const Operands& operands, const Columns& columns, float scale)
      : memory_(operands.weight), transposed_(operands.layout.transposed), columns_(columns), scale_(scale) {}
  void write(int64_t row, int64_t first, int64_t n, float* out) const override {
    const int64_t length = memory_.size(1), *index = columns_.index.data();
    const float* w = memory_.const_data_ptr<float>();
    if (transposed_)
      mix_run<float, float, float>(w + index[row] * length + first, nullptr, out, true, scale_, n);
    else
      gather_columns(w + row * length, length, out, n, index + first, n, scale_, 1);
  }

 private:
  Tensor memory_;
  bool transposed_;
  const Columns& columns_;
  float scale_;
};

// What x is multiplied with in y, and g in dx: Phi [out, in], or what of it is not zero.
struct MixedWeight {
  const Tensor& weight;
  const std::optional<Tensor>& target;
  const std::optional<Tensor>& mixed;  // Phi, where the caller has it
  uint64_t seed;
  double p;
  bool per_weight;
  const Columns* only;  // of a neuron mask without a target: the kept columns

  double scale() const { return p < 1 ? 1 / (1 - p) : 0; }
  int64_t columns() const { return only ? only->kept : weight.size(1); }
  WeightLayout layout() const { return WeightLayout(weight); }

  // [out, columns()] in the compute dtype.
  Tensor in_memory(at::ScalarType dtype) const {
    if (mixed) return *mixed;
    if (p == 1 && !only) return target ? target->to(dtype) : at::zeros_like(weight, weight.options().dtype(dtype));
    const Operands operands(weight, target);
    const auto& layout = operands.layout;
    if (!only) {
      const Tensor phi = layout.empty(weight, dtype);
      mix_into(phi, operands.weight, operands.target, seed, p, scale(), layout.mask(per_weight));
      return layout.logical(phi);
    }
    if (!layout.transposed) return gather(operands.weight, *only, only->kept, scale(), dtype);
    const auto precise = at::toOpMathType(weight.scalar_type());  // round once, after the product
    return operands.weight.index_select(0, index_tensor(*only)).to(precise).mul_(scale()).to(dtype).t();
  }

  // The rows of the same as it lies in memory: [out, columns()], or [columns(), out].
  std::unique_ptr<Rows> rows() const {
    if (mixed) return std::make_unique<DenseRows>(layout().transposed ? mixed->t().contiguous() : mixed->contiguous());
    const Operands operands(weight, target);
    if (only) return std::make_unique<KeptRows>(operands, *only, scale());
    return mixed_rows(operands.weight, operands.target, seed, p, operands.layout.mask(per_weight));
  }
};

// a [m, depth] b [depth, n] + bias, by product.cpp.
Tensor multiply(
    const Strided& a, const RightHand& b, int64_t m, int64_t n, int64_t depth,
    const std::optional<Tensor>& bias = std::nullopt) {
  const Tensor c = at::empty({m, n}, at::kFloat);
  const Tensor added = bias ? bias->contiguous() : Tensor();
  multiply(m, n, depth, a, b, bias ? added.const_data_ptr<float>() : nullptr, c.mutable_data_ptr<float>());
  return c;
}

Strided rows_as_left(const Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), 1}; }

// x Phi^T + b.
Tensor forward_product(const Tensor& x, const MixedWeight& phi, const std::optional<Tensor>& bias, bool fused) {
  if (!fused) return at::linear(x, phi.in_memory(x.scalar_type()), bias);
  const auto rows = phi.rows();
  const int64_t out_features = phi.weight.size(0);
  return multiply(rows_as_left(x), {*rows, !phi.layout().transposed}, x.size(0), out_features, phi.columns(), bias);
}

// g Phi.
Tensor input_gradient(const Tensor& g, const MixedWeight& phi, bool fused) {
  if (!fused) return at::linear(g, phi.in_memory(g.scalar_type()).t());
  const auto rows = phi.rows();
  const int64_t out_features = phi.weight.size(0);
  return multiply(rows_as_left(g), {*rows, phi.layout().transposed}, g.size(0), phi.columns(), out_features);
}

// a^T b for two matrices of many rows, b contiguous.
Tensor product_over_rows(const Tensor& a, const Tensor& b, bool fused) {
  if (!fused) return at::mm(a.t(), b);
  const Strided left{a.const_data_ptr<float>(), 1, a.stride(0)};
  return multiply(left, {DenseRows(b), false}, a.size(1), b.size(1), a.size(0));
}

// dw of a neuron mask: scale * (g^T x[:, kept]) in the kept columns, zero in the others, in one pass over dw.
Tensor kept_columns_gradient(
    const Tensor& g, const Tensor& kept_input, const Tensor& weight, const Columns& columns, double scale, bool fused) {
  const WeightLayout layout(weight);
  const Tensor memory = layout.empty(weight, weight.scalar_type());
  // A draw beyond a fixed capacity (probability < 2e-12) loses the gradient of the columns that did not fit.
  const int64_t n = std::min(columns.kept, kept_input.size(1));
  // [kept, out]: this order measured up to 1.3 times the speed of g^T x[:, kept], the long side being contiguous.
  const Tensor compact = product_over_rows(kept_input.narrow(1, 0, n), g, fused);
  if (layout.transposed) {
    memory.zero_();
    const auto precise = at::toOpMathType(compact.scalar_type());
    memory.index_copy_(
        0, index_tensor(columns).narrow(0, 0, n), compact.to(precise).mul_(scale).to(weight.scalar_type()));
    return layout.logical(memory);
  }
  MIXOUT_DISPATCH_COLUMNS(weight.scalar_type(), g.scalar_type(), [&] {
    const auto* from = compact.const_data_ptr<compute_t>();
    auto* to = memory.mutable_data_ptr<value_t>();
    const int64_t width = layout.in_features, out = layout.out_features;
    at::parallel_for(0, out, row_grain(width), [&](int64_t begin, int64_t end) {
      scatter_columns_transposed(
          from + begin, out, to + begin * width, width, columns.index.data(), n,
          static_cast<arithmetic_t<compute_t>>(scale), end - begin);
    });
  });
  return memory;
}

// dw of a weight mask: scale * M * (g^T x), the mask regenerated over the product.
Tensor masked_gradient(
    const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& seed, double p, double scale, bool fused) {
  const WeightLayout layout(weight);
  if (p == 1) return layout.logical(layout.empty(weight, weight.scalar_type()).zero_());
  const Tensor product = layout.transposed ? product_over_rows(x, g, fused) : product_over_rows(g, x, fused);
  const Tensor memory =
      product.scalar_type() == weight.scalar_type() ? product : layout.empty(weight, weight.scalar_type());
  mix_into(memory, product, std::nullopt, seed_value(seed), p, scale, layout.mask(/*per_weight=*/true));
  return layout.logical(memory);
}

// dx [rows, in] from its kept columns, the others zero.
Tensor scatter(const Tensor& compact, const Columns& columns, int64_t in_features) {
  const Tensor dx = at::empty({compact.size(0), in_features}, compact.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dx.scalar_type(), "mix_linear_backward", [&] {
    const auto* from = compact.const_data_ptr<scalar_t>();
    auto* to = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, compact.size(0), row_grain(in_features), [&](int64_t begin, int64_t end) {
      scatter_columns(
          from + begin * columns.kept, to + begin * in_features, in_features, columns.index.data(), columns.kept,
          end - begin);
    });
  });
  return dx;
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// [..., n] as [rows, n]; the rows are counted, since reshape cannot infer them when n is 0.
Tensor rows_of(const Tensor& t) {
  const auto leading = t.sizes().slice(0, t.dim() - 1);
  return t.resolve_neg().reshape({c10::multiply_integers(leading), t.size(-1)}).contiguous();
}

}  // namespace

void mixout_list(
    const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& targets, const Tensor& seeds, double p, bool per_weight) {
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  for (size_t k = 0; k < outs.size(); ++k) {
    const Operands operands(weights[k], targets[k]);
    mix_into(
        outs[k], operands.weight, operands.target, static_cast<uint64_t>(seed[k]), p, 1 / (1 - p),
        operands.layout.mask(per_weight));
  }
}

std::tuple<Tensor, Tensor> mix_linear(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target, const std::optional<Tensor>& bias,
    const Tensor& seed, double p, bool per_weight, std::optional<int64_t> saved_columns,
    const std::optional<Tensor>& mixed, bool fused) {
  const Tensor x = rows_of(input);
  const bool only_kept = !per_weight && !target && !mixed;  // Phi is zero outside the kept columns

  Tensor kept_input = at::empty({x.size(0), 0}, x.options());
  Columns columns;
  if (!per_weight && (only_kept || saved_columns != 0)) {
    columns = kept(seed, p, weight.size(1));
    const int64_t width = saved_columns.value_or(0) > 0 ? *saved_columns : columns.kept;
    kept_input = gather(x, columns, width, 1, x.scalar_type());
  }
  const bool fits = only_kept && columns.kept <= kept_input.size(1);
  const MixedWeight phi{weight, target, mixed, seed_value(seed), p, per_weight, fits ? &columns : nullptr};
  const Tensor y = forward_product(fits ? kept_input.narrow(1, 0, columns.kept) : x, phi, bias, fused);
  if (per_weight || saved_columns == 0) kept_input = at::empty({x.size(0), 0}, x.options());
  return {at::_unsafe_view(y, with_last(input.sizes(), weight.size(0))), kept_input};
}

std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Tensor& grad, const Tensor& saved_input, const Tensor& weight, const std::optional<Tensor>& target,
    const Tensor& seed, double p, double scale, bool per_weight, std::tuple<bool, bool, bool> needs,
    const std::optional<Tensor>& mixed, bool fused) {
  const auto [needs_dx, needs_dw, needs_db] = needs;
  const int64_t in_features = weight.size(1);
  const Tensor g = rows_of(grad);
  Columns columns;
  if (!per_weight) columns = kept(seed, p, in_features);

  Tensor dx = at::empty({0}, grad.options()), dw = at::empty({0}, weight.options()), db = at::empty({0}, grad.options());
  if (needs_dx) {
    const bool only_kept = !per_weight && !target && !mixed;
    dx = input_gradient(
        g, {weight, target, mixed, seed_value(seed), p, per_weight, only_kept ? &columns : nullptr}, fused);
    if (only_kept) dx = scatter(dx, columns, in_features);
    dx = dx.view(with_last(grad.sizes(), in_features));
  }
  if (needs_dw) {
    dw = per_weight ? masked_gradient(g, rows_of(saved_input), weight, seed, p, scale, fused)
                    : kept_columns_gradient(g, saved_input, weight, columns, scale, fused);
  }
  if (needs_db) db = g.sum(0);
  return {dx, dw, db};
}

}  // namespace mixout::cpu
