// y = x Phi^T + b and its derivatives. Phi is mixed in one pass into a temporary and multiplied by the vendor library;
// with a neuron mask dw is a GEMM of the kept columns alone, and with target zero all three products are.
#include "mixout.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>

#include "../mix.h"
#include "kernels.h"

namespace mixout::cpu {

namespace {

constexpr int64_t kGrain = 16384;

// float32 products of many rows: oneDNN measured 1.1 to 1.25 times the speed of the BLAS that F.linear calls, at 1024
// rows and above on Zen 4; below that it was up to twice as slow (docs/performance.md). torch.backends.mkldnn turns it
// off, and results then equal F.linear's bit for bit.
constexpr int64_t kOneDnnRows = 1024;

using OneDnnLinear = Tensor(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
    c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// x [rows, k] times weight^T [n, k] plus bias.
Tensor dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  static const auto onednn = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const bool large = x.size(0) >= kOneDnnRows && x.size(1) >= 128 && weight.size(0) >= 128;
  if (onednn && large && x.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn())
    return onednn->typed<OneDnnLinear>().call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  return at::linear(x, weight, bias);
}

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

// phi = Phi(weight, target), phi lying in memory as the weight does; p < 1.
void mix_weight_into(
    const Tensor& phi, const Tensor& weight, const std::optional<Tensor>& target, uint64_t seed, double p,
    bool per_weight) {
  const WeightLayout layout(weight);
  const auto u = target ? std::optional<Tensor>(layout.transposed ? target->t().contiguous() : target->contiguous())
                        : std::nullopt;
  mix_into(phi, layout.memory(weight), u, seed, p, 1 / (1 - p), layout.mask(per_weight));
}

// Phi [out, in] in the compute dtype.
Tensor mixed_weight(
    const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, double p, bool per_weight,
    at::ScalarType dtype) {
  const WeightLayout layout(weight);
  if (p == 1) return target ? target->to(dtype) : at::zeros_like(weight, weight.options().dtype(dtype));
  const Tensor phi = layout.empty(weight, dtype);
  mix_weight_into(phi, weight, target, seed_value(seed), p, per_weight);
  return layout.logical(phi);
}

Tensor index_tensor(const Columns& columns) {
  return at::from_blob(const_cast<int64_t*>(columns.index.data()), {columns.kept}, at::TensorOptions(at::kLong));
}

// scale * w[:, kept] [out, kept] in the compute dtype: all of Phi that is not zero when the target is.
Tensor kept_weight(const Tensor& weight, const Columns& columns, double p, at::ScalarType dtype) {
  const WeightLayout layout(weight);
  const double scale = p < 1 ? 1 / (1 - p) : 0;
  const Tensor memory = layout.memory(weight);
  if (!layout.transposed) return gather(memory, columns, columns.kept, scale, dtype);
  const auto precise = at::toOpMathType(memory.scalar_type());  // round once, after the product
  return memory.index_select(0, index_tensor(columns)).to(precise).mul_(scale).to(dtype).t();
}

// dw of a neuron mask: scale * (g^T x[:, kept]) in the kept columns, zero in the others, in one pass over dw.
Tensor kept_columns_gradient(
    const Tensor& g, const Tensor& kept_input, const Tensor& weight, const Columns& columns, double scale) {
  const WeightLayout layout(weight);
  const Tensor memory = layout.empty(weight, weight.scalar_type());
  // A draw beyond a fixed capacity (probability < 2e-12) loses the gradient of the columns that did not fit.
  const int64_t n = std::min(columns.kept, kept_input.size(1));
  // [kept, out]: this order measured up to 1.3 times the speed of g^T x[:, kept], the long side being contiguous.
  const Tensor compact = at::mm(kept_input.narrow(1, 0, n).t(), g);
  if (layout.transposed) {
    memory.zero_();
    memory.index_copy_(0, index_tensor(columns).narrow(0, 0, n), 
        compact.to(at::toOpMathType(compact.scalar_type())).mul_(scale).to(weight.scalar_type()));
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
    const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& seed, double p, double scale) {
  const WeightLayout layout(weight);
  if (p == 1) return layout.logical(layout.empty(weight, weight.scalar_type()).zero_());
  const Tensor product = layout.transposed ? at::mm(x.t(), g) : at::mm(g.t(), x);
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
  return t.reshape({c10::multiply_integers(leading), t.size(-1)}).contiguous();
}

}  // namespace

void mixout_list(
    const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& targets, const Tensor& seeds, double p, bool per_weight) {
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  for (size_t k = 0; k < outs.size(); ++k)
    mix_weight_into(outs[k], weights[k], targets[k], static_cast<uint64_t>(seed[k]), p, per_weight);
}

std::tuple<Tensor, Tensor> mix_linear(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target, const std::optional<Tensor>& bias,
    const Tensor& seed, double p, bool per_weight, std::optional<int64_t> saved_columns,
    const std::optional<Tensor>& mixed) {
  const int64_t in_features = weight.size(1), out_features = weight.size(0);
  const auto dtype = input.scalar_type();
  const Tensor x = rows_of(input);
  const bool only_kept = !per_weight && !target && !mixed;  // Phi is zero outside the kept columns

  Tensor kept_input = at::empty({x.size(0), 0}, x.options());
  Columns columns;
  if (!per_weight && (only_kept || saved_columns != 0)) {
    columns = kept(seed, p, in_features);
    kept_input = gather(x, columns, saved_columns.value_or(0) > 0 ? *saved_columns : columns.kept, 1, dtype);
  }
  Tensor y;
  if (mixed) {
    y = dense(x, *mixed, bias);
  } else if (p == 1 && target) {
    y = at::linear(x, target->to(dtype), bias);  // bit for bit F.linear(x, u, b)
  } else if (only_kept && columns.kept <= kept_input.size(1)) {
    y = dense(kept_input.narrow(1, 0, columns.kept), kept_weight(weight, columns, p, dtype), bias);
  } else {
    y = dense(x, mixed_weight(weight, target, seed, p, per_weight, dtype), bias);
  }
  if (per_weight || saved_columns == 0) kept_input = at::empty({x.size(0), 0}, x.options());
  return {y.view(with_last(input.sizes(), out_features)), kept_input};
}

std::tuple<Tensor, Tensor, Tensor> mix_linear_backward(
    const Tensor& grad, const Tensor& saved_input, const Tensor& weight, const std::optional<Tensor>& target,
    const Tensor& seed, double p, double scale, bool per_weight, std::tuple<bool, bool, bool> needs,
    const std::optional<Tensor>& mixed) {
  const auto [needs_dx, needs_dw, needs_db] = needs;
  const int64_t in_features = weight.size(1);
  const auto dtype = grad.scalar_type();
  const Tensor g = rows_of(grad);
  Columns columns;
  if (!per_weight) columns = kept(seed, p, in_features);

  Tensor dx = at::empty({0}, grad.options()), dw = at::empty({0}, weight.options()), db = at::empty({0}, grad.options());
  if (needs_dx) {
    if (mixed) {
      dx = dense(g, mixed->t(), std::nullopt);
    } else if (!per_weight && !target) {
      dx = scatter(dense(g, kept_weight(weight, columns, p, dtype).t(), std::nullopt), columns, in_features);
    } else {
      dx = dense(g, mixed_weight(weight, target, seed, p, per_weight, dtype).t(), std::nullopt);
    }
    dx = dx.view(with_last(grad.sizes(), in_features));
  }
  if (needs_dw) {
    dw = per_weight ? masked_gradient(g, rows_of(saved_input), weight, seed, p, scale)
                    : kept_columns_gradient(g, saved_input, weight, columns, scale);
  }
  if (needs_db) db = g.sum(0);
  return {dx, dw, db};
}

}  // namespace mixout::cpu
