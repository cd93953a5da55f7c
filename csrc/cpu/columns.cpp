#include "columns.h"

#include <algorithm>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "kernels.h"
#include "mixer.h"

namespace mixout::cpu {

namespace {

// Runs its last argument with value_t and compute_t: float32 beside any compute type, or one type for both.
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

// Rows of this width for one thread.
int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// factor * x[:, kept] for a matrix with unit column stride.
Tensor gather_scaled(const Tensor& x, const Columns& columns, int64_t width, double factor, at::ScalarType dtype) {
  const Tensor out = at::empty({x.size(0), width}, x.options().dtype(dtype));
  const int64_t n = std::min(columns.kept, width), ldx = x.stride(0);
  MIXOUT_DISPATCH_COLUMNS(x.scalar_type(), dtype, [&] {
    const auto* from = x.const_data_ptr<value_t>();
    auto* to = out.mutable_data_ptr<compute_t>();
    at::parallel_for(0, x.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      gather_columns(
          from + begin * ldx, ldx, to + begin * width, width, width, columns.index.data(), n,
          static_cast<arithmetic_t<value_t>>(factor), end - begin);
    });
  });
  return out;
}

// Of a weight of type W, in T.
template <typename W, typename T>
class KeptRows : public Rows<T> {
 public:
  KeptRows(const Operands& operands, const Columns& columns, float factor)
      : memory_(operands.weight), transposed_(operands.layout.transposed), columns_(columns), factor_(factor) {}

  void write(int64_t row, int64_t rows, int64_t column, int64_t columns, T* out, int64_t ld) const override {
    const int64_t length = memory_.size(1), *index = columns_.index.data();
    const W* w = memory_.const_data_ptr<W>();
    if (!transposed_)
      return gather_columns(w + row * length, length, out, ld, columns, index + column, columns, factor_, rows);
    for (int64_t r = 0; r < rows; ++r)
      mix_run<W, W, T>(
          w + index[row + r] * length + column, nullptr, out + r * ld, true, factor_, columns);
  }

 private:
  Tensor memory_;
  bool transposed_;
  const Columns& columns_;
  float factor_;
};

}  // namespace

Columns columns_of(const Draw& draw, int64_t width) {
  Columns columns{std::vector<int64_t>(width + 1), 0};
  columns.kept = kept_columns(draw.seed, draw.offset, draw.threshold(), width, columns.index.data());
  return columns;
}

Tensor gather(const Tensor& x, const Columns& columns, int64_t width) {
  return gather_scaled(x, columns, width, 1, x.scalar_type());
}

Tensor gather_weight(const Operands& operands, const Columns& columns, double factor, at::ScalarType dtype) {
  const Tensor& w = operands.weight;
  if (!operands.layout.transposed) return gather_scaled(w, columns, columns.kept, factor, dtype);
  const int64_t length = w.size(1);
  const Tensor out = at::empty({columns.kept, length}, w.options().dtype(dtype));
  MIXOUT_DISPATCH_COLUMNS(w.scalar_type(), dtype, [&] {
    const auto* from = w.const_data_ptr<value_t>();
    auto* to = out.mutable_data_ptr<compute_t>();
    at::parallel_for(0, columns.kept, row_grain(length), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        mix_run<value_t, value_t, compute_t>(
            from + columns.index[c] * length, nullptr, to + c * length, true,
            static_cast<arithmetic_t<value_t>>(factor), length);
    });
  });
  return out.t();
}

template <typename T>
std::unique_ptr<Rows<T>> gathered_rows(const Operands& operands, const Columns& columns, double factor) {
  if (operands.weight.scalar_type() == at::kFloat)
    return std::make_unique<KeptRows<float, T>>(operands, columns, static_cast<float>(factor));
  TORCH_CHECK(
      operands.weight.scalar_type() == c10::CppTypeToScalarType<T>::value, "mixout_kernels: no CPU kernel gathers a ",
      operands.weight.scalar_type(), " weight into ", c10::CppTypeToScalarType<T>::value);
  return std::make_unique<KeptRows<T, T>>(operands, columns, static_cast<float>(factor));
}

template std::unique_ptr<Rows<float>> gathered_rows<float>(const Operands&, const Columns&, double);
template std::unique_ptr<Rows<c10::BFloat16>> gathered_rows<c10::BFloat16>(const Operands&, const Columns&, double);
template std::unique_ptr<Rows<c10::Half>> gathered_rows<c10::Half>(const Operands&, const Columns&, double);

Tensor scatter(const Tensor& kept, const Columns& columns, int64_t width) {
  const Tensor dx = at::empty({kept.size(0), width}, kept.options());
  const int64_t n = columns.kept;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dx.scalar_type(), "mix_linear_backward", [&] {
    const auto* from = kept.const_data_ptr<scalar_t>();
    auto* to = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, kept.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      scatter_columns(from + begin * n, to + begin * width, width, columns.index.data(), n, end - begin);
    });
  });
  return dx;
}

Tensor scatter_weight(const Tensor& compact, const Columns& columns, const Tensor& weight, double factor) {
  const WeightLayout layout(weight);
  const Tensor memory = layout.empty(weight, weight.scalar_type());
  const int64_t n = compact.size(0), out = layout.out_features, in = layout.in_features;
  MIXOUT_DISPATCH_COLUMNS(weight.scalar_type(), compact.scalar_type(), [&] {
    const auto* from = compact.const_data_ptr<compute_t>();
    auto* to = memory.mutable_data_ptr<value_t>();
    const auto scale = static_cast<arithmetic_t<compute_t>>(factor);
    const auto* index = columns.index.data();
    if (layout.transposed) {
      at::parallel_for(0, in, row_grain(out), [&](int64_t begin, int64_t end) {
        int64_t c = std::lower_bound(index, index + n, begin) - index;
        for (int64_t row = begin; row < end; ++row) {
          const bool keep = c < n && index[c] == row;
          mix_run<compute_t, compute_t, value_t>(from + c * out, nullptr, to + row * out, keep, scale, out);
          c += keep;
        }
      });
    } else {
      at::parallel_for(0, out, row_grain(in), [&](int64_t begin, int64_t end) {
        scatter_columns_transposed(from + begin, out, to + begin * in, in, index, n, scale, end - begin);
      });
    }
  });
  return layout.logical(memory);
}

}  // namespace mixout::cpu
